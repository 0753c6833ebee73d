"""Convert a Hugging Face model to a Megatron-Core checkpoint, on CPU.

    python tools/convert/hf_to_megatron.py --hf-model path/to/Llama-3.1-8B --output checkpoints/llama-3.1-8b --verify

Reads safetensors one tensor at a time, so that memory holds little more than the largest tensor. Training loads the
result with --pretrained-checkpoint, --load or --ebft-encoder-load at any parallel layout, and --use-checkpoint-args
reads architecture and tokenizer from it. megatron_ebft/hf/families.py lists the supported families. An unknown key in
config.json stops the conversion; the error names the key.
"""

import functools
import os
import sys
import warnings

from megatron_ebft.run.flags.flag import Flag, Group
from megatron_ebft.run.flags.parser import Parser

CONVERSION = Group("conversion", (
    Flag("--hf-model", str, "local folder of the Hugging Face model", metavar="DIR", required=True),
    Flag("--output", str, "folder for the checkpoint; it must not hold one yet", metavar="CKPT", required=True),
    Flag("--dtype", str, "dtype of the weights", choices=("bf16", "fp32"), default_text="that of the files")))


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    from megatron_ebft.common.device import import_megatron

    import_megatron()
    import torch
    import verify

    from megatron_ebft.hf.convert import hf_to_megatron

    args = Parser("tools/convert/hf_to_megatron.py", __doc__, own=(CONVERSION, verify.VERIFICATION)).parse_args(argv)
    verify.check_flags(args)
    say = functools.partial(print, flush=True)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.dtype]
    print("saved", hf_to_megatron(args.hf_model, args.output, dtype, say, verify.verifier(args, say)), flush=True)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversion needs no GPU
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
