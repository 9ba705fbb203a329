"""tools/memory.py: what it computes without a GPU is what a real forward pass keeps."""
import pytest
import torch
from conftest import ROOT, fails

from models import TimeEquivariant
from tools import memory

CLIPS = 16, 32                                                                  # frames, pixels


def kept_by(outputs, model):
    """Bytes of all tensors that the graph of these outputs has saved, but for the model's weights."""
    nodes = [output.grad_fn for output in outputs]
    seen, sizes = set(nodes), {}
    while nodes:
        node = nodes.pop()
        names = [name for name in dir(node) if name.startswith("_saved_")]
        for value in [getattr(node, name) for name in names]:
            if torch.is_tensor(value) and value.numel():
                storage = value.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        inputs = {function for function, _ in node.next_functions if function} - seen
        seen |= inputs
        nodes += inputs
    weights = {weight.data_ptr() for weight in model.parameters()}
    return sum(size for place, size in sizes.items() if place not in weights)


def test_it_computes_what_a_real_step_on_a_cpu_keeps_for_the_backward_pass():
    model = TimeEquivariant("r3d18_narrow")
    frames, size = CLIPS
    outputs = model(torch.randn(4, 2, 3, frames, size, size)).values()
    assert memory.memory("r3d18_narrow", 4, *CLIPS, "off")[0] == kept_by(outputs, model)


def test_weights_count_four_times_for_gradients_and_two_moments():
    model = TimeEquivariant("r3d18_narrow")
    optimizer = torch.optim.AdamW(model.parameters())
    sum(output.sum() for output in model(torch.randn(2, 2, 3, 4, 16, 16)).values()).backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*model.parameters(), *(weight.grad for weight in model.parameters()), *moments]
    assert memory.memory("r3d18_narrow", 2, 4, 16, "off")[1] == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("amp", ("bf16", "fp16", "off"))
def test_twice_the_videos_take_twice_the_memory_but_for_what_autocast_copies_of_the_weights(amp):
    one, weights = memory.memory("r3d18_narrow", 16, *CLIPS, amp)
    two, three = (memory.memory("r3d18_narrow", videos, *CLIPS, amp)[0] for videos in (32, 48))
    copies = 2 * one - two
    assert three - two == two - one
    assert (0 <= copies < one / 100) if amp == "off" else (0.49 < copies / (weights / 4) < 0.51)


@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_half_the_precision_takes_about_half_the_memory_a_video(amp):
    def a_video(precision):
        eight, nine = (memory.memory("r3d18_narrow", videos, *CLIPS, precision)[0] for videos in (8, 9))
        return nine - eight

    assert 0.5 < a_video(amp) / a_video("off") < 0.6


def test_the_table_in_the_docs_is_what_the_command_prints(capsys):
    memory.main([])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(printed) == 5
    cells = [line.replace("|", " ").split() for line in (ROOT / "docs" / "speed.md").read_text().splitlines()]
    assert [row for row in printed if row not in cells] == []


def test_sizes_that_no_network_takes_are_refused_in_a_sentence():
    assert "above 4" in fails(memory.main, ["--arch", "s3dg", "--frames", "4"])
    assert fails(memory.main, ["--batch-size", "1"]) == "2"
