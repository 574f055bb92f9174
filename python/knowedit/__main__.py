"""`python -m knowedit` is the `knowedit` command (for torchrun)."""

from .cli import main

if __name__ == "__main__":
    main()
