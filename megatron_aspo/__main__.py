"""`python -m megatron_aspo` is the command `megatron-aspo`."""

from megatron_aspo.cli import main

if __name__ == "__main__":
    main()
