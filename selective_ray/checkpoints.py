"""Checkpoints: read the weights in a file or a bucket, find a network's own among them, fit them in."""

import argparse
import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from selective_ray import objects
from selective_ray.errors import UserError, first_line
from selective_ray.objects import DIRECT, Access

if TYPE_CHECKING:  # torch takes seconds to import, and a checkpoint is hashed without it
    import torch

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_REMEDY = "save the weights with torch.save(network.state_dict(), FILE)"
# Where training programs put the weights beside optimizer and epoch; of DINO's two networks the teacher is
# the one that is evaluated.
_WRAPPERS = ("state_dict", "model", "teacher", "student", "net")
# Put before every name by DataParallel and by torch.compile.
_SHELLS = ("module.", "_orig_mod.")


def absolute(uri: str) -> str:
    """Return a checkpoint's place as a process in another folder finds it."""
    return uri if _SCHEME.match(uri) else str(Path(uri).absolute())


def open_checkpoint(uri: str, access: Access = DIRECT) -> BinaryIO:
    """Open a checkpoint to read: a path, or a URI of any store that `objects` reaches.

    Its bytes can be read from any position. Raises UserError.
    """
    try:
        if objects.is_local(uri):
            return Path(objects.local_path(uri)).open("rb")
        # Archives are read in many small pieces, each a request where the file is in a bucket.
        return io.BytesIO(objects.read(objects.Request(uri), access))
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {uri}; check --checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"checkpoint {uri} is a folder; give the file in it that holds the weights") from None
    except PermissionError:
        raise UserError(f"checkpoint {uri} is not readable for this user; change its permissions") from None
    except OSError as error:
        raise UserError(
            f"checkpoint {uri} cannot be read ({first_line(error)}); check --checkpoint and the access to "
            "it, or copy the file to this machine"
        ) from None


def sha256(uri: str, access: Access = DIRECT) -> str:
    """Return the hash of a checkpoint's bytes, "sha256:…"; raises UserError."""
    with open_checkpoint(uri, access) as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def read(uri: str, access: Access = DIRECT) -> Mapping[str, "torch.Tensor"]:
    """Read the state dict in a checkpoint, and run nothing that is in it; raises UserError.

    Takes what torch.save wrote, plain or in a training program's wrapper, safetensors, and TorchScript
    archives, which OpenAI published CLIP as.
    """
    with open_checkpoint(uri, access) as file:
        try:
            state = _load(file)
        except UserError:
            raise
        except pickle.UnpicklingError as error:
            raise UserError(
                f"checkpoint {uri} is damaged or holds more than tensors, which is never loaded because "
                f"it could run a program; {_REMEDY}"
            ) from error
        except Exception as error:  # whatever the broken bytes lead torch to
            raise UserError(
                f"checkpoint {uri} is damaged ({first_line(error)}); copy it again, or {_REMEDY}"
            ) from error
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not (isinstance(state, Mapping) and state and _all_named_tensors(state)):
        raise UserError(f"checkpoint {uri} holds no state dict, or more than that; {_REMEDY}")
    return state


def _load(file: BinaryIO) -> Any:
    import torch

    head = file.read(9)
    file.seek(0)
    if head[8:] == b"{":  # the length of a header in JSON, then the header
        try:
            from safetensors.torch import load
        except ImportError:
            raise UserError(
                "this checkpoint is in safetensors format: pip install 'selective-ray[timm]' brings what "
                "reads it"
            ) from None
        return load(file.read())
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_script(archive)
    file.seek(0)
    # weights_only: any other pickle may run a program when it is loaded. The options of a training program,
    # kept beside the weights by CLD and DINO, are attributes and nothing else.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # what torch warns about is refused
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_script(archive: zipfile.ZipFile) -> dict[str, "torch.Tensor"]:
    """Collect the tensors of a TorchScript archive by the names of their modules.

    torch itself reads weights together with the program. Here the program stays unread: its classes become
    bare containers, and the only thing that is called makes a tensor out of stored numbers.
    """
    import torch

    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")

    dtypes = {
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ShortStorage": torch.int16,
        "CharStorage": torch.int8,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
    }

    class Container:
        pass

    def tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
        return torch.as_strided(storage, size, stride, offset).clone()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("__torch__"):
                return Container
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return tensor
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            if module == "torch.jit._pickle":  # lists of numbers, with their type
                return lambda value, *_: value
            if module == "torch" and name in dtypes:
                return dtypes[name]
            raise pickle.UnpicklingError(f"{module}.{name}")

        def persistent_load(self, stored: tuple) -> torch.Tensor:
            _, dtype, key, _, _ = stored
            return torch.frombuffer(bytearray(archive.read(f"{root}data/{key}")), dtype=dtype)

    found: dict[str, torch.Tensor] = {}
    containers = [("", Reader(io.BytesIO(archive.read(f"{root}data.pkl"))).load())]
    visited = set()
    while containers:
        prefix, container = containers.pop()
        if id(container) in visited:
            continue
        visited.add(id(container))
        for name, value in vars(container).items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
            elif isinstance(value, Container):
                containers.append((f"{prefix}{name}.", value))
    return found


def _all_named_tensors(state: Mapping) -> bool:
    import torch

    return all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())


def located(state: Mapping[str, "torch.Tensor"], prefixes: tuple[str, ...]) -> OrderedDict:
    """Return the weights under each prefix in turn, without it; a prefix that no name has changes nothing."""
    # Layers write their version beside the tensors; without it they accept what older ones saved.
    versions = dict(getattr(state, "_metadata", None) or {})
    state = OrderedDict(state)

    def under(prefix: str) -> None:
        nonlocal state, versions
        state = OrderedDict(
            (key.removeprefix(prefix), value) for key, value in state.items() if key.startswith(prefix)
        )
        versions = {
            f"{key}.".removeprefix(prefix).removesuffix("."): value
            for key, value in versions.items()
            if f"{key}.".startswith(prefix)
        }

    while shells := [shell for shell in _SHELLS if all(key.startswith(shell) for key in state)]:
        under(shells[0])
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in state):
            under(prefix)
    state._metadata = versions
    return state


def fit(
    network: "torch.nn.Module",
    state: OrderedDict,
    *,
    unused: tuple[str, ...] = (),
    adapt: Callable[[Any], Any] | None = None,
    source: str,
    encoder: str,
) -> None:
    """Load located weights into the network, less those under the unused prefixes.

    adapt renames or resamples what does not fit as it is. Raises UserError that lists what still does not.
    """
    own = network.state_dict()
    versions = state._metadata or {"": own._metadata[""]}  # mnasnet insists on one
    if adapt and any(key not in state or state[key].shape != own[key].shape for key in own):
        try:
            state = OrderedDict(adapt(dict(state)))
        except Exception:  # written for other layouts: what does not fit is listed below
            state = OrderedDict(state)
    state = OrderedDict((key, value) for key, value in state.items() if not key.startswith(unused))
    reshaped = {key for key, value in state.items() if key in own and value.shape != own[key].shape}
    fitting = OrderedDict((key, value) for key, value in state.items() if key not in reshaped)
    fitting._metadata = OrderedDict(versions)
    result = network.load_state_dict(fitting, strict=False)
    missing = [key for key in result.missing_keys if key not in reshaped]
    shapes = [f"{key} {_shape(state[key])} instead of {_shape(own[key])}" for key in state if key in reshaped]
    complaints = (
        ("missing", missing),
        ("unexpected", result.unexpected_keys),
        ("of another shape", shapes),
    )
    found = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in complaints if keys]
    if found:
        raise UserError(
            f"checkpoint {source} does not fit encoder {encoder} ({'; '.join(found)}); "
            "name the network that it was trained as with --encoder"
        )


def _some(keys: list[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _shape(tensor: "torch.Tensor") -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
