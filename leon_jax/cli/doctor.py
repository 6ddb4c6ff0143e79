"""Prints what every bug report should begin with.

    leon doctor
    leon doctor --json

Prints the versions of the packages, the devices and their memory, the host, whether the compiler
for TPUs, the peers and each extra are installed, the cache folders with their sizes, the
environment variables that matter, and whether the shipped model is complete.

JAX is started in another process. If it fails, hangs or crashes, the reason is printed. The command
changes nothing, and never prints the value of a variable whose name has KEY, TOKEN, SECRET or
PASSWORD.
"""

import importlib.util
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

from absl import flags

FLAGS = flags.FlagValues()
_JSON = flags.DEFINE_bool("json", False, "Print JSON.", flag_values=FLAGS)
_SECONDS = flags.DEFINE_integer(
    "seconds", 120, "How long to wait until JAX has started.", lower_bound=1, flag_values=FLAGS
)

_PACKAGES = (
    "leon_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "orbax-checkpoint", "grain",
    "optax", "numpy", "pillow", "safetensors", "tokenizers", "array-record", "jaxtyping",
    "ml-collections",
)  # fmt: skip
_VARIABLES = re.compile(
    r"(JAX|XLA|LEON|TPU|LIBTPU|NCCL)_.*|CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH|PYTHONPATH|TFDS_DATA_DIR"
    r"|OMP_NUM_THREADS|OPENBLAS_NUM_THREADS"
)
_SECRETS = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_ROOT = pathlib.Path(__file__).resolve().parents[2]

# Runs in another process, because a backend that fails may also end or block the process.
_DEVICES = """
import json, jax
devices = jax.devices()
print("\\n" + json.dumps({
    "backend": jax.default_backend(),
    "processes": jax.process_count(),
    "devices": [
        {"id": d.id, "platform": d.platform, "kind": d.device_kind} | {
            key: (d.memory_stats() or {}).get(name)
            for key, name in (("bytes_limit", "bytes_limit"), ("bytes_used", "bytes_in_use"))
        }
        for d in devices
    ],
}))
"""


def main(argv: list[str]) -> None:
    """Runs `leon doctor`."""
    del argv
    report = {
        "versions": _versions(),
        "jax": _jax(_SECONDS.value),
        "host": _host(),
        "installed": _installed(),
        "caches": _caches(),
        "environment": _environment(),
        "shipped_model": _shipped_model(),
    }
    print(json.dumps(report, indent=1) if _JSON.value else _text(report))


def _versions() -> dict[str, Any]:
    """Returns the versions of Python, the system and the packages; None: not installed."""
    import leon_jax

    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    versions |= {name: _version(name) for name in _PACKAGES}
    versions["leon_jax"] = leon_jax.__version__
    versions["leon_jax path"] = str(pathlib.Path(leon_jax.__file__).parent)
    if (_ROOT / ".git").exists():
        versions["commit"] = _output(["git", "-C", str(_ROOT), "describe", "--always", "--dirty"])
    return versions


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _jax(seconds: int) -> dict[str, Any]:
    """Returns the devices of JAX, or the error with which JAX does not start."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"JAX did not start within {seconds} s (--seconds)"}
    except OSError as error:
        return {"error": f"{sys.executable} cannot be run: {error.strerror}"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # JAX ends a traceback with advice in dashes; the error stands before it.
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        last = (errors or lines or ["it printed nothing"])[-1]
        return {"error": f"exit code {done.returncode}: {last}"}


def _host() -> dict[str, Any]:
    """Returns cores and memory of the host, and the limits of its control group."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host: dict[str, Any] = {"cores": os.cpu_count(), "memory": memory}
    if hasattr(os, "sched_getaffinity"):
        host["usable cores"] = len(os.sched_getaffinity(0))
    if available := re.search(r"MemAvailable: +(\d+) kB", _read("/proc/meminfo")):
        host["available memory"] = int(available[1]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        host["memory limit of the container"] = int(limit)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        host["core limit of the container"] = int(quota[0]) / int(quota[1])
    return host


def _installed() -> dict[str, str]:
    """Returns what is installed of the optional parts, in words."""
    library = os.environ.get("TPU_LIBRARY_PATH")
    local = _ROOT / ".tpu" / "libtpu" / "libtpu.so"
    if library:
        exists = pathlib.Path(library).is_file()
        compiler = f"{library} (TPU_LIBRARY_PATH)" if exists else f"missing: there is no {library}"
    elif importlib.util.find_spec("libtpu"):
        compiler = "installed"
    elif local.is_file():
        compiler = f"{local}, but TPU_LIBRARY_PATH is not set"
    else:
        compiler = "missing: pip install 'leon_jax[tpu]', or make tpu"
    peers = _ROOT / ".venv-peers" / ".installed"
    parts = {
        "TPU compiler": compiler,
        "peers": "installed" if peers.is_file() else "missing: make peers, in a clone",
    }
    return parts | {f"extra {name}": state for name, state in _extras().items()}


def _extras() -> dict[str, str]:
    """Returns for each extra "installed", or the packages that are missing or too old."""
    try:
        names = metadata.metadata("leon_jax").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {"": "not known, because leon_jax is not installed as a package"}
    unmet = {name: _unmet("leon_jax", name, {("leon_jax", name)}) for name in sorted(names)}
    return {
        name: f"missing: {', '.join(dict.fromkeys(missing))}" if missing else "installed"
        for name, missing in unmet.items()
    }


def _unmet(package: str, extra: str, seen: set[tuple[str, str]]) -> list[str]:
    """Returns the requirements of an extra of an installed package that are not met.

    Args:
      package: the package.
      extra: the extra.
      seen: packages and extras that are already checked.
    """
    from packaging.requirements import Requirement

    unmet = []
    for requirement in map(Requirement, metadata.requires(package) or []):
        marker = requirement.marker
        if not marker or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        version, words = _version(requirement.name), str(requirement).split(";")[0].strip()
        if version is None:
            unmet.append(words)
        elif not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{words} (installed: {version})")
        else:
            for name in sorted(requirement.extras):
                if (requirement.name, name) not in seen:
                    seen.add((requirement.name, name))
                    unmet += _unmet(requirement.name, name, seen)
    return unmet


def _caches() -> dict[str, Any]:
    """Returns the cache folders, what each holds, and its size in bytes."""
    from leon_jax import compilation_cache
    from leon_jax.cli.cache import prepared_folders
    from leon_jax.config import UserError

    caches: dict[str, Any] = {}
    try:
        compiled = compilation_cache.compiled_folder()
        caches[str(compiled)] = {"content": "compiled programs"}
    except UserError as error:
        caches["error"] = str(error)
    try:
        found = {str(path): {"content": held} for path, held in prepared_folders().items()}
        caches = {str(compilation_cache.cache_folder()): {"content": "all"}} | caches | found
        for path in caches:
            if path != "error":
                caches[path]["size"] = compilation_cache.size(pathlib.Path(path))
    except OSError as error:
        caches["error"] = f"{error.filename} cannot be read: {error.strerror}"
    return caches


def _environment() -> dict[str, str]:
    """Returns the environment variables that matter, without secrets."""
    return {
        name: "(set)" if _SECRETS.search(name) else value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name)
    }


def _shipped_model() -> dict[str, Any]:
    """Returns the files of the shipped model with their sizes in bytes."""
    folder = pathlib.Path(__file__).parents[1] / "weights" / "emoji"
    files = sorted(path for path in folder.glob("*") if path.is_file())
    expected = {"decoder.safetensors", "tokenizer.safetensors", "text.json", "encoder.safetensors"}
    missing = sorted(expected - {path.name for path in files if path.stat().st_size})
    return {
        "folder": str(folder),
        "missing": missing,
        "files": {path.name: path.stat().st_size for path in files},
    }


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _text(report: dict[str, Any]) -> str:
    """Returns the report for a terminal."""
    jax = report["jax"]
    if "error" in jax:
        devices = {"error": jax["error"]}
    else:
        devices = {"backend": jax["backend"], "processes": jax["processes"]}
        devices |= {f"device {d['id']}": _device(d) for d in jax["devices"]}
    caches = {
        path: value if path == "error" else f"{_size(value['size'])}, {value['content']}"
        for path, value in report["caches"].items()
    }
    model = report["shipped_model"]
    state = f"missing: {', '.join(model['missing'])}" if model["missing"] else "complete"
    sections = {
        "versions": {k: v or "not installed" for k, v in report["versions"].items()},
        "jax": devices,
        "host": {k: _size(v) if "memory" in k else v for k, v in report["host"].items()},
        "installed": report["installed"],
        "caches": caches,
        "environment": report["environment"] or {"none": "of the variables that matter is set"},
        "shipped model": {"folder": model["folder"], "state": state}
        | {name: _size(size) for name, size in model["files"].items()},
    }
    lines = []
    for title, values in sections.items():
        width = max(map(len, values))
        lines += ["", title, *(f"  {name:{width}}  {value}" for name, value in values.items())]
    return "\n".join(lines[1:])


def _device(device: dict[str, Any]) -> str:
    words = f"{device['platform']}, {device['kind']}"
    if device["bytes_limit"]:
        words += f", {_size(device['bytes_limit'])} of memory"
        words += f", {_size(device['bytes_used'] or 0)} in use"
    return words


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
