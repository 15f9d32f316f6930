"""`python -m loraweave` is the command `loraweave`."""

from loraweave.cli import main

if __name__ == "__main__":
    main()
