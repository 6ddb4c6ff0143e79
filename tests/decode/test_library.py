"""Which prepared folder a model retrieves from."""

from leon_jax.decode import library
from tests import tiny


def test_a_folder_in_the_cache_serves_whatever_its_name_is(monkeypatch, tmp_path):
    """An older version named it after the digests of the files' bytes."""
    checkpoint, prepared = tiny.folders()
    monkeypatch.setattr(library, "HERE", tmp_path / "nowhere")
    monkeypatch.setattr(library, "cache", lambda: tmp_path)
    (tmp_path / "emoji-0123456789ab").symlink_to(prepared)
    (tmp_path / "emoji-0000").mkdir()
    assert library.find(checkpoint, None) == tmp_path / "emoji-0123456789ab"
