"""`python -m knowedit` is the `knowedit` command (for torchrun)."""

from knowedit.cli.app import main

if __name__ == "__main__":
    main()
