"""Convert a Hugging Face model to a Megatron checkpoint: python tools/convert_hf_to_megatron.py SOURCE TARGET [options].

The same as `megatron-aspo convert --to megatron`; --help lists the options.
"""

import sys

from megatron_aspo.cli import main

main(["convert", "--to", "megatron", *sys.argv[1:]])
