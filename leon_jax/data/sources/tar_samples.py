"""Groups the members of a tar file to samples, by the dots in their names."""

import dataclasses
from collections.abc import Callable

from leon_jax.data.sources.field_values import RecordError
from leon_jax.data.sources.raw_record import RawRecord, Reject

# How many extensions a message lists, and how many rejects wait for the end of a group.
_MAX_LISTED, _MAX_HELD = 20, 1000


@dataclasses.dataclass
class Sample:
    """The files of a sample by extension, its first error, and all its extensions."""

    name: str
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    error: RecordError | None = None
    extensions: list[str] = dataclasses.field(default_factory=list)

    def list(self, extension: str) -> None:
        """Lists an extension for error messages."""
        if len(self.extensions) < _MAX_LISTED:
            self.extensions.append(extension)

    @property
    def listed(self) -> str:
        """The extensions of the sample, for error messages."""
        return f" (its files end in .{', .'.join(self.extensions)})"


class Group:
    """Consecutive members whose names are equal up to the first dot.

    WebDataset reads them as one sample. `22.01.jpg`, `22.01.txt` and `22.02.jpg`, `22.02.txt` are
    two, so members with further dots also form samples of their own, by the name up to the last
    dot. Such a sample counts if it has an image and a caption. If it lacks one, it is rejected;
    beside a sample of WebDataset (`22.jpg`) its files are further files of that sample, and are
    ignored as WebDataset's users expect of unknown extensions.

    Args:
      stem: the name up to the first dot.
      split: splits an extension with dots into a rest of the key and the last extension.
      read: converts a sample to its records.
    """

    def __init__(
        self,
        stem: str,
        split: Callable[[str], tuple[str, str]],
        read: Callable[[Sample], list[RawRecord | Reject]],
    ):
        self.stem = stem
        self._split, self._read = split, read
        self._whole: Sample | None = None
        self._dotted: Sample | None = None
        self._complete = False  # whether a dotted sample was used
        self._rejects: list[RawRecord | Reject] = []

    def sample(self, extension: str) -> tuple[Sample, str, list[RawRecord | Reject]]:
        """Returns the sample of the next member, its extension there, and what is complete now."""
        rest, last = self._split(extension)
        if not rest:
            self._whole = self._whole or Sample(self.stem)
            return self._whole, last, []
        name, outcomes = f"{self.stem}.{rest}", []
        if self._dotted is None or name != self._dotted.name:
            outcomes = self._end_dotted()
            self._dotted = Sample(name)
        return self._dotted, last, outcomes

    def end(self) -> list[RawRecord | Reject]:
        """Returns the remaining outcomes, after the last member."""
        outcomes = self._end_dotted()
        whole = self._whole
        if whole is not None and (whole.files or whole.error):
            return outcomes + self._read(whole)
        if whole is not None and not (self._complete or self._rejects or outcomes):
            return self._read(whole)
        return self._rejects + outcomes

    def _end_dotted(self) -> list[RawRecord | Reject]:
        if self._dotted is None:
            return []
        sample, self._dotted = self._dotted, None
        outcomes = self._read(sample)
        if sample.error or any(isinstance(outcome, RawRecord) for outcome in outcomes):
            self._complete = True
            return outcomes
        self._rejects += outcomes
        if len(self._rejects) < _MAX_HELD:
            return []
        outcomes, self._rejects = self._rejects, []
        self._complete = True
        return outcomes
