"""Which prepared folder a model retrieves from."""

from leon_jax.generate import retriever
from tests import tiny


def test_a_folder_in_the_cache_serves_whatever_its_name_is(monkeypatch, tmp_path):
    """An older version named it after the digests of the files' bytes."""
    checkpoint, prepared = tiny.folders()
    monkeypatch.setattr(retriever, "DEFAULT_FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr(retriever, "cache_folder", lambda: tmp_path)
    (tmp_path / "emoji-0123456789ab").symlink_to(prepared)
    (tmp_path / "emoji-0000").mkdir()
    assert retriever.find_index(checkpoint, None) == tmp_path / "emoji-0123456789ab"
