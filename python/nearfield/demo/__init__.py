"""`python -m nearfield.demo`: three small, complete uses of the three operator families, with a report in out/."""
