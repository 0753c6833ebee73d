"""Which gold tokens count in the cross entropy."""

import torch

from megatron_ebft.data.micro_batches import GoldBatch


def test_gold_tokens_that_count():
    """Tokens 1..T−1 by hand: not the first of a document, which nothing predicts, and answers alone."""
    tokens = torch.arange(6)[None]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    answers = torch.tensor([[False, True, True, True, True, False]])

    def counting(**masks) -> list[int]:
        valid = GoldBatch(tokens, torch.zeros(1, dtype=torch.int64), **masks).gold_valid()
        return (valid[0].nonzero().squeeze(1) + 1).tolist()

    assert counting() == [1, 2, 3, 4, 5]
    assert counting(document_BT=documents) == [1, 2, 4, 5]
    assert counting(answer_BT=answers) == [1, 2, 3, 4]
    assert counting(document_BT=documents, answer_BT=answers) == [1, 2, 4]
