import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from src.distillation.base import LORA_TARGETS, EncodedRow, collate, count_parameters, response_hidden
from src.distillation.lora import add_lora, merge_adapter
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


def test_reference_adapters_have_174_million_parameters(real_data):
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(real_data / "configs/qwen3-8b"))
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


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["q_proj"]}, {}])
def test_loaded_adapters_say_what_peft_says(make_model, tmp_path, settings):
    """Two adapters of other kinds on one model: with DoRA, on one projection alone, and on all."""
    folders = {}
    for name, own in (("one", settings), ("two", {})):
        wanted = {"target_modules": list(LORA_TARGETS)} | own
        model = get_peft_model(make_model(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **wanted))
        generator = torch.Generator().manual_seed(len(folders))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data += torch.rand(parameter.shape, generator=generator) * 0.2
        model.save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    batch, states = collate(ROWS, 0), []
    for folder in folders.values():
        ours, theirs = merge_adapter(make_model(), folder), PeftModel.from_pretrained(make_model(), folder).eval()
        with torch.no_grad():
            states.append(response_hidden(ours, batch)[0])
            torch.testing.assert_close(states[-1], response_hidden(theirs, batch)[0], rtol=1e-4, atol=1e-5)
    assert (states[0] - states[1]).norm() > 0.01 * states[0].norm()


def test_dropout_is_not_lost(make_model):
    model, batch = adapted(make_model, True, dropout=0.5), collate(ROWS, 0)
    still, _ = response_hidden(model.eval(), batch)
    torch.testing.assert_close(response_hidden(adapted(make_model, False), batch)[0], still)
    dropped, _ = response_hidden(model.train(), batch)
    assert (dropped - still).norm() > 0.01 * still.norm()
