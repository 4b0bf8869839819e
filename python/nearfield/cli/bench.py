def main() -> None:
    "x"
