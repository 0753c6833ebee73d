"""Convert a Megatron-Core checkpoint to a Hugging Face model, on CPU.

    python tools/convert/megatron_to_hf.py --load checkpoints/ebft --output path/to/published --verify

The checkpoint may come from training, at any parallel layout, or from tools/convert/hf_to_megatron.py. The tool writes
sharded safetensors one tensor at a time, with an index, config.json, generation_config.json and the tokenizer. These
files come from the checkpoint, which carries them from the original model, or from --hf-template.
"""

import argparse
import functools
import os
import sys
import warnings


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    import verify

    from megatron_ebft.hf.convert import megatron_to_hf
    from megatron_ebft.run.arguments import Parser

    parser = Parser(prog="tools/convert/megatron_to_hf.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="CKPT", help="folder with checkpoints (uses the latest), or "
                        "one iter_* folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty folder for the Hugging Face "
                        "model")
    parser.add_argument("--hf-template", metavar="DIR", help="Hugging Face folder whose config.json, "
                        "generation_config.json and tokenizer replace those in the checkpoint")
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="size of a safetensors file "
                        "in 10⁹ bytes (default: 5)")
    verify.add_flags(parser)
    args, say = parser.parse_args(argv), functools.partial(print, flush=True)
    verify.check_flags(args)
    if not args.max_shard_size > 0:
        raise ValueError(f"--max-shard-size {args.max_shard_size}: must be above 0")
    megatron_to_hf(args.load, args.output, args.hf_template, int(args.max_shard_size * 1e9), say,
                   verify.verifier(args, say))
    print("saved", args.output, flush=True)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversion needs no GPU
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
