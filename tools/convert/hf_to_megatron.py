"""Convert a Hugging Face model to a Megatron-Core checkpoint, on CPU.

    python tools/convert/hf_to_megatron.py --hf-model path/to/Llama-3.1-8B --output checkpoints/llama-3.1-8b --verify

The tool reads safetensors one tensor at a time, so that memory holds little more than the largest. The result works
with --pretrained-checkpoint, --load and --ebft-encoder-load at any parallel layout; --use-checkpoint-args takes
architecture and tokenizer from it. megatron_ebft/hf/families.py lists the supported families. An unknown key in
config.json stops the conversion; the error names the key.
"""

import argparse
import functools
import os
import sys
import warnings


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    import torch
    import verify

    from megatron_ebft.hf.convert import hf_to_megatron
    from megatron_ebft.run.arguments import Parser

    parser = Parser(prog="tools/convert/hf_to_megatron.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True, metavar="DIR", help="local folder of the Hugging Face model")
    parser.add_argument("--output", required=True, metavar="CKPT", help="folder for the checkpoint; must not hold one")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="dtype of the weights (default: unchanged)")
    verify.add_flags(parser)
    args, say = parser.parse_args(argv), functools.partial(print, flush=True)
    verify.check_flags(args)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.dtype]
    print("saved", hf_to_megatron(args.hf_model, args.output, dtype, say, verify.verifier(args, say)), flush=True)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversion needs no GPU
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
