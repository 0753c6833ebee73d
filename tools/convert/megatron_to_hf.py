"""Convert a Megatron-Core checkpoint to a Hugging Face model, on CPU.

    python tools/convert/megatron_to_hf.py --load checkpoints/ebft --output path/to/published --verify

Reads a checkpoint of training, at any parallel layout, or of tools/convert/hf_to_megatron.py. Writes sharded
safetensors one tensor at a time, with index, config.json, generation_config.json and tokenizer. These come from the
checkpoint, which carries them along, or from --hf-template.
"""

import functools
import os
import sys
import warnings

from megatron_ebft.run.flags.flag import Flag, Group, above
from megatron_ebft.run.flags.parser import Parser

CONVERSION = Group("conversion", (
    Flag("--load", str, "folder with checkpoints, of which the newest is converted, or one iter_* folder",
         metavar="CKPT", required=True),
    Flag("--output", str, "folder for the Hugging Face model, new or empty", metavar="DIR", required=True),
    Flag("--hf-template", str, "Hugging Face folder with config.json, generation_config.json and tokenizer, instead of "
         "those in the checkpoint", metavar="DIR"),
    Flag("--max-shard-size", float, "size of the largest safetensors file, in 10⁹ bytes", default=5.0, metavar="GB",
         valid=above(0))))


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    from megatron_ebft.common.device import import_megatron

    import_megatron()
    import verify

    from megatron_ebft.hf.convert import megatron_to_hf

    args = Parser("tools/convert/megatron_to_hf.py", __doc__, own=(CONVERSION, verify.VERIFICATION)).parse_args(argv)
    verify.check_flags(args)
    say = functools.partial(print, flush=True)
    megatron_to_hf(args.load, args.output, args.hf_template, int(args.max_shard_size * 1e9), say,
                   verify.verifier(args, say))
    print("saved", args.output, flush=True)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversion needs no GPU
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
