"""Which blocks count, against the words of the method: one document from the predictor on, and answers alone."""

import pytest
import torch

from megatron_ebft.layout.strided import StridedLayout

LAYOUT = StridedLayout(seq_length=17, context_length=2, stride=1, rollout_length=3, num_samples=2)


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("has_answers", [False, True])
def test_blocks_that_count(has_documents, has_answers):
    generator = torch.Generator().manual_seed(0)
    document_BT = (torch.rand(20, 17, generator=generator) < 0.2).long().cumsum(1)
    answer_BT = torch.rand(20, 17, generator=generator) < 0.8
    valid = LAYOUT.valid_blocks(document_BT if has_documents else None, answer_BT if has_answers else None)
    if valid is True:
        assert not has_documents and not has_answers
        return
    assert valid.shape == (20, 13) and 0.1 < valid.float().mean() < 0.9
    for row, documents, answers in zip(valid.tolist(), document_BT.tolist(), answer_BT.tolist()):
        for block, counts in enumerate(row):
            anchor = 2 + block
            in_one_document = len(set(documents[anchor - 1 : anchor + 3])) == 1
            is_answer = all(answers[anchor : anchor + 3])
            assert counts == ((in_one_document or not has_documents) and (is_answer or not has_answers))
