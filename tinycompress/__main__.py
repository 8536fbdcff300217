"""`python -m tinycompress` is the command `tinycompress`."""

from .cli import main

if __name__ == "__main__":
    main()
