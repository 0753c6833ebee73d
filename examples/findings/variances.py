"""How noisy alignment and diversity are, by the number n of rollouts, from the Gram matrices of the start's rollouts.

    python examples/findings/variances.py [--output DIR]

Needs the data and the start that run.py makes; writes DIR/results/variances.json. A block has 16 rollouts. For each n
they form 16 / n groups, and diversity is computed within a group. Means over the held-out blocks of `code`, without
whitening:

alignment, diversity  variance over a block's rollouts of 2 φ_jᵀφ_y, and of 2/(n−1) Σ φ_jᵀφ_i
noise                 variance of 2 φ_jᵀφ_i over the other rollouts i of a block, divided by n − 1
advantage             variance of the leave-one-out advantage

Suffixes: B rows, K blocks, M and N rollouts.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.extend(map(str, (Path(__file__).parents[2], Path(__file__).parents[2] / "tools")))

import evaluate
import trained_model
import ways

from megatron_ebft.common.disk import aside

ROLLOUTS = 16
COUNTS = (2, 4, 8, 16)


def valid_grams(data: Path, start: Path, rows: int):
    """Gram matrices of 16 rollouts and the gold completion, of all blocks that count in the held-out rows:
    [blocks, 17, 17]."""
    import torch

    from megatron_ebft.data.datasets import build_datasets
    from megatron_ebft.method.batches import encoder_rows
    from megatron_ebft.method.features import block_grams
    from megatron_ebft.rollout.sampler import sample_rollouts
    from megatron_ebft.run.configs import ebft_config

    args = trained_model.parser("evaluate", __doc__, (evaluate.TEXT,), evaluate.READS).parse_args(list(map(str, (
        *ways.tokenizer(data), *ways.rows("code"), *ways.LAYOUT, "--ebft-num-samples", ROLLOUTS,
        "--ebft-temperature", 1, "--load", start, "--ebft-encoder-load", start, "--micro-batch-size", rows))))
    with trained_model.on_ranks(args) as trained, torch.no_grad():
        _, dataset, _ = build_datasets(
            seq_length=args.seq_length, seed=args.seed, sizes=(0, None, 0), tokenizer=trained.tokenizer,
            valid_data_path=[str(data / "valid_text_document")], data_cache_path=str(data / "cache"), need_answers=True)
        config = ebft_config(args, trained.architecture.num_layers)
        trained.build()
        encoder = evaluate.encoder(args, trained, config)
        gold = evaluate.gold_batch(args, dataset, 0, rows)
        rollouts = sample_rollouts([trained.model], gold, config.layout, config.sampling, 0, config.rollout_rows)
        valid_BK = gold.valid_blocks(config.layout)
        packed = encoder_rows(gold, rollouts, config, valid_BK[..., None].expand(*valid_BK.shape, ROLLOUTS))
        return block_grams(encoder, config.feature_map, packed, [config.layout.rollout_length])[:, :, 0][valid_BK]


def variances(grams, n: int) -> dict[str, float]:
    """The variances of n rollouts, from Gram matrices [blocks, m+1, m+1] with m a multiple of n."""
    import torch

    from megatron_ebft.method.energy import advantages, rewards

    m = grams.shape[-1] - 1
    places = [[*range(first, first + n), m] for first in range(0, m, n)]
    groups = torch.stack([grams[:, place][:, :, place] for place in places], dim=1)  # [blocks, m / n, n+1, n+1]
    alignment, diversity = rewards(groups, "none")
    advantage = advantages(alignment, diversity, "rloo", 1.0, 1.0)
    products_NM = 2 * grams[:, :m, :m]
    others = ~torch.eye(m, dtype=torch.bool)
    noise = torch.stack([row[:, mask].var(-1) for row, mask in zip(products_NM.unbind(1), others)]).mean() / (n - 1)
    return {"alignment": alignment.flatten(1).var(-1).mean().item(),
            "diversity": diversity.flatten(1).var(-1).mean().item(), "noise": noise.item(),
            "advantage": advantage.flatten(1).var(-1).mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "outputs" / "findings",
                        metavar="DIR", help="the output of run.py (default: outputs/findings)")
    output = parser.parse_args().output.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    grams = valid_grams(output / "code" / "data", output / "code" / "start", ways.ROWS)
    by_count = {str(n): {name: float(f"{value:.6g}") for name, value in variances(grams, n).items()} for n in COUNTS}
    (output / "results").mkdir(exist_ok=True)
    with aside(output / "results" / "variances.json") as file:
        file.write_text(json.dumps({"blocks": len(grams), "variances": by_count}) + "\n", encoding="utf-8")
    print(json.dumps({"blocks": len(grams), "variances": by_count}, indent=1))


if __name__ == "__main__":
    main()
