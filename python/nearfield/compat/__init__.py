"""Drop-in replacements for the functions of other libraries: `nearfield.compat.natten`, `nearfield.compat.fla`."""
