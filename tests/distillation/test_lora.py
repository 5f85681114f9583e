import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.distillation.base import LORA_TARGETS, EncodedRow, collate, count_parameters, response_hidden
from src.distillation.lora import add_lora
from src.utils.common import UserError


def test_adapters_are_fp32_and_alone_trainable(make_model):
    """At a learning rate of 2e-5 a bf16 weight would not move."""
    student = add_lora(make_model().bfloat16(), 4, 8, 0.0)
    kinds = {("lora_" in name, p.requires_grad, p.dtype) for name, p in student.named_parameters()}
    assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in student.named_parameters() if "lora_" in name}
    assert adapted == set(LORA_TARGETS)


def test_unknown_lora_target(make_model):
    with pytest.raises(UserError, match=r"no module named c_attn$"):
        add_lora(make_model(), 4, 8, 0.0, ["q_proj", "c_attn"])


def test_reference_adapters_have_174_million_parameters(shared_data):
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shared_data / "configs/qwen3-8b"))
    model = add_lora(student, 64, 128, 0.0)
    assert count_parameters(model, trainable=True) == 174_587_904


ROWS = [EncodedRow("a", (1, 2, 3), (4, 5)), EncodedRow("b", (9, 8), tuple(range(20, 32)))]


def adapted(make_model, fused, dropout=0.0):
    """The same model either way, with adapters that say something."""
    model = add_lora(make_model(), 4, 8, dropout, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_one_function_says_what_peft_says(make_model, autocast):
    found = []
    for fused in (True, False):
        model = adapted(make_model, fused)
        model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden, _ = response_hidden(model, collate(ROWS, 0))
            with torch.no_grad():
                torch.testing.assert_close(response_hidden(model, collate(ROWS, 0))[0], hidden)
        hidden.float().pow(3).sum().backward()
        found.append([hidden, *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours - theirs).float().norm() / theirs.float().norm()
        assert error < (0.1 if autocast else 1e-5)


def test_off_means_off(make_model):
    model, batch = adapted(make_model, True), collate(ROWS, 0)
    on, _ = response_hidden(model, batch)
    with model.disable_adapter():
        off, _ = response_hidden(model, batch)
    bare, _ = response_hidden(make_model(), batch)
    torch.testing.assert_close(off, bare)
    assert (on - off).norm() > 0.1 * off.norm()


def test_dropout_is_not_lost(make_model):
    model, batch = adapted(make_model, True, dropout=0.5), collate(ROWS, 0)
    still, _ = response_hidden(model.eval(), batch)
    torch.testing.assert_close(response_hidden(adapted(make_model, False), batch)[0], still)
    dropped, _ = response_hidden(model.train(), batch)
    assert (dropped - still).norm() > 0.01 * still.norm()
