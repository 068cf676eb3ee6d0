"""A checkpoint is a folder `checkpoint-N`: written beside, renamed when whole; `progress.json` is its last file.

transformer/          the trained network under its released names, loadable by the original tools
transformer_ema/      its moving average, if kept
adapter/              in place of these, where adapters learn; and adapter_ema/
optimizer.pt          optimizer state and the fp16 loss scale; tensors and plain values only
shares/               in place of these, where several processes share the weights: what each of them keeps
high_noise_model/     in place of these, where both of two experts learn: the same of one of them, the network's weights
low_noise_model/      right in it as released models have them; and of the other
ledger.npz            times each record was used
digests.json          sizes and hashes of all these files
progress.json         step, epoch, cursor, group, plan_version, attention; without it the folder is not a checkpoint

One that is no longer of the run, because it went on from an earlier one, is moved to `set_aside`, and never deleted.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from reeltune.checkpoint import digests
from reeltune.core.errors import UserError, refuse
from reeltune.core.files import flush_folder, flush_tree, free_path, is_disk_error, remove, renamed, room, writing
from reeltune.core.reading import as_user_error, brief, read_table
from reeltune.core.types import Progress
from reeltune.distributed import sharded_io
from reeltune.distributed.sharded_io import Piece
from reeltune.memory.attention import KERNELS

SHARES = "shares"
NAME = re.compile(r"checkpoint-(\d+)$")
PARTIAL = re.compile(r"\.checkpoint-\d+(\.deleted)?\.partial$")
OURS = ("progress.json", "ledger.npz", "optimizer.pt", SHARES)  # of which no other tool's checkpoint has any
SET_ASIDE = "set_aside"
ADAPTER = "adapter"
PARTS = {"high": "high_noise_model", "low": "low_noise_model"}  # of two experts, as released models name them
WEIGHTS = ("transformer", ADAPTER, SHARES, *PARTS.values())  # beginnings of the names of files that hold them


def complete(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest step first."""
    return sorted(filter(is_complete, Path(output_dir).glob("checkpoint-*")), key=step_of)


def is_complete(path: Path) -> bool:
    return NAME.match(path.name) is not None and (path / "progress.json").is_file()


def step_of(checkpoint: Path) -> int:
    match = NAME.match(checkpoint.name)
    assert match is not None
    return int(match[1])


def of_other_tools(output_dir: Path) -> list[Path]:
    """Folders with the name of a checkpoint that hold files and none of ours, and files of such a name."""
    named = [path for path in sorted(Path(output_dir).glob("checkpoint-*")) if NAME.match(path.name)]
    return [path for path in named if not path.is_dir() or (any(path.iterdir()) and not _has_ours(path))]


def _has_ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in OURS)


def parts(checkpoint: Path) -> dict[str, Path]:
    """Expert -> its folder in the checkpoint of a run that trained both; {} for any other run."""
    found = {name: checkpoint / folder for name, folder in PARTS.items()}
    return found if all(folder.is_dir() for folder in found.values()) else {}


def part(checkpoint: Path, expert: str | None) -> Path:
    """Where it keeps this expert's network: in a part of its own, or right in it if only one network learnt."""
    return checkpoint if expert is None else parts(checkpoint).get(expert, checkpoint)


def part_in(checkpoint: Path, expert: str | None) -> Path:
    """Where to write this expert's network; None: the only network."""
    return checkpoint if expert is None else checkpoint / PARTS[expert]


def whole(path: Path) -> Path:
    """The checkpoint that this is a part of, or the checkpoint itself."""
    return path.parent if path.name in PARTS.values() and (path.parent / "progress.json").is_file() else path


def is_ours(path: Path) -> bool:
    """Whether it is a whole checkpoint of ours, or a part of one."""
    return (whole(path) / "progress.json").is_file()


def expert_of(path: Path) -> str | None:
    """The expert whose part this is; None for a whole checkpoint."""
    return None if whole(path) == path else next(name for name, folder in PARTS.items() if folder == path.name)


def their_weights(checkpoint: Path) -> Path:
    """Where another tool's checkpoint keeps the network: `transformer`, or the folder itself."""
    inside = checkpoint / "transformer"
    return inside if inside.is_dir() else checkpoint


def find(output_dir: Path, name: str | None) -> Path | None:
    """The checkpoint to resume from: `latest` in output_dir, or a folder by path or by name.

    None if nothing was asked for, or `latest` of a run that has none yet.
    Raises UserError for a path that is no complete checkpoint.
    """
    if name is None:
        return None
    if name == "latest":
        return next(reversed(complete(output_dir)), None)
    for path in (Path(name), Path(output_dir) / name):
        if (path / "progress.json").is_file():
            return path
    have = ", ".join(path.name for path in complete(output_dir)) or "none"
    raise UserError(
        "resume",
        f"resume_from_checkpoint is {name!r}, which is no complete checkpoint (a folder with progress.json); "
        f"complete ones in {output_dir}: {have}; or use latest",
    )


def save(
    output_dir: Path,
    progress: Progress,
    *,
    write_networks: Callable[[Path], None],
    write_more: Callable[[Path], None],
    keep: int | None,
) -> tuple[Path, int]:
    """Writes checkpoint-N whole or not at all, then prunes. Returns (folder, bytes).

    write_networks: writes weights and, by write_state, optimizer state of each network that learns; write_more: what is
    beside them. Raises UserError if the disk is full or refuses; what was there before stays as it was.
    """
    with _partial(output_dir, progress.step, main=True) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_networks(partial)
        write_more(partial)
        return _finish(partial, progress, keep)


def write_state(folder: Path, optimizer_state: dict) -> None:
    """Writes the optimizer state of the network that this checkpoint, or part of one, keeps."""
    torch.save(optimizer_state, folder / "optimizer.pt")


def save_shares(
    output_dir: Path,
    progress: Progress,
    pieces: Mapping[str | None, Iterable[Piece]],
    group: ProcessGroup,
    *,
    write_more: Callable[[Path], None],
    keep: int | None,
) -> tuple[Path, int] | None:
    """Writes a checkpoint as `save` does, called by all processes of `group`, of which each writes what it keeps.

    pieces: by expert; None: the only network. The first process calls write_more and returns as `save`, others None.
    """
    main = dist.get_rank(group) == 0
    with _partial(output_dir, progress.step, main=main) as partial:
        own: digests.Digests = {}
        for expert, kept in pieces.items():
            shares = part_in(partial, expert) / SHARES
            sharded_io.write(shares, kept, group)  # makes the folder, and returns once all have written
            own |= digests.digest(partial, sorted(shares.glob(f"__{dist.get_rank(group)}_*")))
        gathered = [own] * dist.get_world_size(group)
        dist.all_gather_object(gathered, own, group)
        if not main:
            return None
        write_more(partial)
        return _finish(partial, progress, keep, {name: of for one in gathered for name, of in one.items()})


def _folder(output_dir: Path, step: int) -> Path:
    return Path(output_dir) / f"checkpoint-{step}"


@contextmanager
def _partial(output_dir: Path, step: int, *, main: bool) -> Iterator[Path]:
    """Where to make a folder and write a checkpoint into it; the main process removes it if that fails."""
    final = _folder(output_dir, step)
    partial = Path(output_dir) / f".{final.name}.partial"
    try:
        yield partial
    except (OSError, RuntimeError, ValueError, SafetensorError, CheckpointException) as broken:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        causes: list[BaseException] = [broken]
        if isinstance(broken, CheckpointException):  # of all processes
            causes = [cause for cause, _ in broken.failures.values()]
        if not any(map(is_disk_error, causes)):
            raise
        last = next(reversed(complete(output_dir)), None)
        raise UserError(
            "save",
            f"{final.name} could not be written ({causes[0]}{room(partial)}); free space in {output_dir}, or bring it "
            "back, and run again with resume_from_checkpoint latest, which finds "
            f"{last.name if last else 'no checkpoint yet'}",
        ) from broken


def _finish(
    partial: Path, progress: Progress, keep: int | None, shares: digests.Digests | None = None
) -> tuple[Path, int]:
    """Writes progress and digests, renames the folder, and deletes older ones. Returns (folder, bytes).

    shares: digests that the processes which wrote them have made already.
    """
    final = _folder(partial.parent, progress.step)
    text = json.dumps(asdict(progress), indent=2) + "\n"
    mark = partial / "progress.json"
    mark.write_text(text)
    _open_to_others(partial, mark.stat().st_mode)
    known = {} if shares is None else shares
    rest = [path for path in digests.files_of(partial) if path.relative_to(partial).as_posix() not in known]
    digests.write(partial, known | digests.digest(partial, rest))
    size_bytes = flush_tree(partial)
    old = _hidden(final) if final.exists() else None  # an unfinished leftover, or the same step saved before
    partial.rename(final)
    flush_folder(final.parent)
    if old is not None:
        remove(old)
    others = [path for path in complete(final.parent) if path != final]
    for old in others[: len(others) + 1 - max(keep, 1)] if keep is not None else []:
        _delete(old)
    return final, size_bytes


def _open_to_others(folder: Path, mode: int) -> None:
    """All files get the mode that this process makes files with: safetensors lets their owner alone read them."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode != mode:
            path.chmod(mode)


def _delete(checkpoint: Path) -> None:
    """Raises as `_hidden`."""
    remove(_hidden(checkpoint))


def _hidden(checkpoint: Path) -> Path:
    """Renames it, to be deleted, to what `sweep` knows: a kill in between leaves nothing that seems a checkpoint.

    Raises UserError for a folder that another tool made.
    """
    if checkpoint in of_other_tools(checkpoint.parent):
        raise UserError(
            "save", f"{checkpoint} was made by another tool and is not written over; give another output_dir"
        )
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted.partial")
    remove(doomed)
    return checkpoint.rename(doomed)


def set_later_aside(output_dir: Path, step: int) -> list[Path]:
    """Moves checkpoints later than `step` out of the run's line. Returns where they are now.

    Raises CannotWriteError.
    """
    moved = []
    for later in complete(output_dir):
        if step_of(later) > step:
            aside = Path(output_dir) / SET_ASIDE
            with writing(aside):
                aside.mkdir(exist_ok=True)
                moved.append(renamed(later, free_path(aside / later.name)))
    return moved


# ---- reading


def progress_of(checkpoint: Path) -> Progress:
    """Raises UserError for a file that is damaged or another checkpoint's, which names the last good one before it."""
    return _progress(checkpoint, sound_before(checkpoint))


def sound_before(checkpoint: Path) -> str:
    """The remedy for a damaged checkpoint: the last one before it whose progress and digests are sound, all read."""
    for earlier in reversed(complete(checkpoint.parent)):
        if NAME.match(checkpoint.name) and step_of(earlier) < step_of(checkpoint):
            with suppress(UserError):
                _progress(earlier, "")
                if not digests.damages(earlier):
                    return f"go on from the sound one before it, resume_from_checkpoint {earlier.name}, or its weights"
    return "restore it from a copy; there is no sound checkpoint before it"


def verify(checkpoint: Path, *, under: tuple[str, ...] = ("",)) -> None:
    """Raises UserError for files that are not as they were written, which names the last sound one before it.

    under: beginnings of the names of the files that are looked at.
    """
    inside = whole(checkpoint)
    if inside != checkpoint:
        under = (checkpoint.name,)
    if lines := digests.damages(inside, under=under):
        raise damaged(inside, lines)


def holder_of(weights: Path) -> tuple[Path, tuple[str, ...]] | None:
    """(the checkpoint of ours that a folder or file of weights is or lies in, beginnings of the names of its files
    there); None for weights from elsewhere."""
    path = weights.absolute()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "progress.json").is_file():
            inside = path.relative_to(folder).as_posix()
            return folder, WEIGHTS if folder == path else (inside if path.is_file() else f"{inside}/",)
    return None


def verify_weights(weights: Path | None) -> None:
    """Verifies these weights alone, as `verify` does. None, and weights from elsewhere, are not checked."""
    if weights is not None and (held := holder_of(weights)) is not None:
        folder, under = held
        verify(folder, under=under)


def damaged(checkpoint: Path, lines: list[str]) -> UserError:
    return UserError(f"{checkpoint} is damaged; {sound_before(checkpoint)}", lines)


def _progress(checkpoint: Path, remedy: str) -> Progress:
    file = checkpoint / "progress.json"
    table = read_table(file, remedy)
    known = {field.name for field in fields(Progress)}
    problems = [f"has no {name}; {remedy}" for name in ("step", "epoch", "cursor") if name not in table]
    problems += [
        f"has {brief(name)}, which this version does not know; {remedy}" for name in table if name not in known
    ]
    problems += [
        f"{name} is {brief(value)}; expected a whole number from 0; {remedy}"
        for name, value in table.items()
        if name in known and name != "attention" and not (type(value) is int and 0 <= value < 2**62)
    ]
    if (kernel := table.get("attention", "")) not in ("", *KERNELS):
        problems.append(f"attention is {brief(kernel)}; expected one of {', '.join(KERNELS)}; {remedy}")
    refuse(str(file), problems)
    table = {"plan_version": 0, **table}
    if (version := table["plan_version"]) > Progress.plan_version:
        raise UserError(
            str(file), f"plan_version is {version}, and this version knows 0 to {Progress.plan_version}; {remedy}"
        )
    if NAME.match(checkpoint.name) and table["step"] != step_of(checkpoint):
        raise UserError(str(file), f"says step {table['step']} in a folder named {checkpoint.name}; {remedy}")
    return Progress(**table)


def load(checkpoint: Path) -> dict:
    """Optimizer state (on the CPU) of a checkpoint that one process wrote, or of a part. Raises UserError for a damaged
    file."""
    file, remedy = checkpoint / "optimizer.pt", sound_before(whole(checkpoint))
    with as_user_error(file, "is damaged", remedy):
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise UserError(str(file), f"is no optimizer's state; {remedy}")
    return state


def is_adapter(checkpoint: Path) -> bool:
    """Whether it, or each of its parts, keeps an adapter, and not the network."""
    return any((folder / ADAPTER).is_dir() for folder in (checkpoint, *parts(checkpoint).values()))


def transformer_of(checkpoint: Path) -> Path | None:
    """Where a checkpoint, or a part of one, has the whole network's weights; None if it is sharded or an adapter's."""
    return None if is_shared(checkpoint) or is_adapter(checkpoint) else weights_in(checkpoint)


def weights_in(checkpoint: Path) -> Path:
    """Where a checkpoint of one network has its config.json and weights: `transformer`; a part has them right in it."""
    return checkpoint if checkpoint.name in PARTS.values() else checkpoint / "transformer"


def is_shared(checkpoint: Path) -> bool:
    """Whether several processes wrote it, or any part of it."""
    return any((folder / SHARES).is_dir() for folder in (checkpoint, *parts(checkpoint).values()))


def sweep(output_dir: Path) -> None:
    """Deletes what a kill in the middle of a save left behind."""
    for path in Path(output_dir).glob(".checkpoint-*.partial"):
        if PARTIAL.match(path.name):
            remove(path)
