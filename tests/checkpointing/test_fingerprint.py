"""The fingerprint of weights sees every element and its place."""

import pytest
import torch
from checkpoint_runs import ARGS
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_ebft.checkpointing.fingerprint import _tensor_hash, weights_fingerprint
from megatron_ebft.model.build import build_start

pytestmark = pytest.mark.usefixtures("one_rank")


def test_fingerprint_sees_every_element_and_its_place():
    module = build_start(ARGS)
    original = weights_fingerprint(module)
    assert original == weights_fingerprint(module) and len(original) == 16
    prints = {original}
    for name, parameter in module.named_parameters():
        if ".1." in name or "layers" not in name:
            flat = parameter.data.view(-1)
            flat[3] += 2 ** -20
            prints.add(weights_fingerprint(module))
            flat[3] -= 2 ** -20
    changed = len(prints)
    fc1 = module.decoder.layers[0].mlp.linear_fc1.weight.data
    fc1[[0, 50]] = fc1[[50, 0]]  # a gate row with an up row
    prints.add(weights_fingerprint(module))
    fc1[[0, 50]] = fc1[[50, 0]]
    a, b = (module.decoder.layers[i].mlp.linear_fc2.weight for i in (0, 1))
    a.data, b.data = b.data, a.data
    prints.add(weights_fingerprint(module))
    a.data, b.data = b.data, a.data
    assert changed == 1 + 6 + 3 and len(prints) == changed + 2
    assert weights_fingerprint(module) == original


def test_fingerprint_does_not_depend_on_chunks():
    data = torch.randn(6, 10)
    tensor = ShardedTensor.from_rank_offsets("key", data, (0, 1, 2), (1, 0, 3), (2, 2, 3),
                                                        prepend_axis_num=1)
    whole = _tensor_hash(tensor, 0)
    assert all(torch.equal(whole, _tensor_hash(tensor, 0, chunk)) for chunk in (1, 7, 20, 59, 60))
