"""`python -m fedllm` is the command `fedllm`, also where no script of that name is on the path."""

from fedllm.cli.main import main

if __name__ == "__main__":
    main()
