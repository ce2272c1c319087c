"""Convert a Megatron checkpoint to a Hugging Face model: python tools/convert_megatron_to_hf.py SOURCE TARGET [options].

The same as `megatron-aspo convert --to huggingface`; --help lists the options.
"""

import sys

from megatron_aspo.cli import main

main(["convert", "--to", "huggingface", *sys.argv[1:]])
