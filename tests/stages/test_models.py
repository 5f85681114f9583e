"""scripts/prepare_models.py: what it does with a folder that is there."""

from src.utils.common import finish_stage


def test_a_model_that_is_made_again_stays_until_the_new_one_is_there(scripts, tmp_path):
    """--overwrite, killed before the new model has replaced the old one, leaves the old one as it was."""
    is_ready = scripts["prepare_models"].is_ready
    target, fingerprint = tmp_path / "model", {"package": "some-model==1"}
    assert not is_ready("teacher", target, fingerprint, overwrite=False)
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"weights")
    finish_stage(target / "prepared.json", fingerprint)
    assert not is_ready("teacher", target, fingerprint, overwrite=True)
    assert is_ready("teacher", target, fingerprint, overwrite=False)
