"""Tasks beside pretraining: plug-ins of the entry-point group `unicl.tasks`."""

import functools
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.resources.abc import Traversable
from typing import Any, Protocol, runtime_checkable

from unicl.config.schema import PRETRAINING, Recipe
from unicl.errors import UniclError, UsageError

logger = logging.getLogger("unicl")

GROUP = "unicl.tasks"


@runtime_checkable
class Plugin(Protocol):
    """What an adapter adds: a task to train.

    Importing it imports no torch. What its methods take and give are objects of the rooms above
    this one, so they are typed there.
    """

    name: str
    """How the entry point is called: `task` of its recipes, and `NAME-` before its evaluations."""
    recipe: type[Recipe]
    """The fields of pretraining's recipe, and a section of its own called by its name."""
    recipes: Traversable
    """Folder of the recipes that it ships."""
    evaluations: tuple[str, ...]
    """What `unicl eval` can do with it, without `NAME-` before."""
    free_on_resume: frozenset[str]
    """Keys of its section that may change when a run goes on: they change no step's result."""

    def complete(self, recipe: Any) -> Any:
        """Return a recipe that knows what follows from its data."""

    def build(self, recipe: Any, ranks: Any, *, start: bool) -> Any:
        """Build `unicl.build.Parts` of a recipe; `start` loads the weights to start from."""

    def load(self, path: Any, recipe: Any) -> Any:
        """Load a run's model as `unicl.towers.pretrained.Pretrained`."""


@runtime_checkable
class Medium(Plugin, Protocol):
    """A plug-in that sees something else than images: evaluated and searched as images are."""

    fine_tuning: Mapping[str, tuple[str, int]]
    """Recipe and epochs that fine-tune on a set with `classes` or `captions`."""

    def adapt(self, model: Any, overrides: Mapping[str, str]) -> Any:
        """Return a `Pretrained` that takes this medium; overrides are of keys of its section."""

    def holds(self, spec: str) -> bool:
        """Say whether a path leads to a set of this medium."""

    def open_source(self, spec: str) -> Any:
        """Open a set as a `unicl.data.sources.Source`, to write shards of it."""

    def open_set(self, spec: str, *, split: str, root: Any, kind: str | None) -> Any:
        """Open a set with classes or captions, as `unicl.data.image_sets.open_image_set` does."""

    def open_items(self, spec: str, *, split: str, root: Any) -> Any:
        """Open a set or any folder, as `unicl.data.image_sets.open_images` does."""

    def follow(self, recipe: Any, towers: Recipe) -> Any:
        """Return a recipe of the plug-in whose section suits the towers of another recipe."""

    def picture(self, encoded: bytes) -> bytes | None:
        """Return an image file that shows an encoded file of this medium; None for others.

        Raises:
            UniclError: It is damaged.
        """


@runtime_checkable
class Skill(Plugin, Protocol):
    """A plug-in whose models do something else with images than embed them, such as find objects.

    It measures that itself, and may add commands.
    """

    def evaluate(
        self,
        evaluation: str,
        model: Any,
        data: Sequence[str],
        options: Any,
        overrides: Mapping[str, str],
    ) -> Any:
        """Do one of `evaluations`; takes and returns what `unicl.evaluator.evaluate` does."""

    def add_commands(self, commands: Any) -> None:
        """Add commands to the subparsers of the command line."""


@runtime_checkable
class Demonstrated(Plugin, Protocol):
    """A plug-in that can show what a pair of towers is worth to it."""

    def demonstrate(self, towers: Any, folder: Any, *, steps: int) -> Any:
        """Train on the towers of a run and on random ones, with data that it draws.

        Everything is written below `folder`. Returns a `unicl.evaluation.report.Comparison`.
        """


@functools.cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def plugin_names() -> tuple[str, ...]:
    """List the installed plug-ins."""
    return tuple(sorted(_entries()))


def find_plugin(name: str) -> Plugin:
    """Return an installed plug-in.

    Raises:
        UsageError: There is none of this name.
        UniclError: It is broken.
    """
    if name not in _entries():
        known = ", ".join((PRETRAINING, *plugin_names()))
        raise UsageError(f"there is no task {name!r}; installed are {known}")
    plugin = _load(_entries()[name])
    if isinstance(plugin, str):
        raise UniclError(f"the plug-in {name} {plugin}")
    return plugin


def working_plugins() -> list[Plugin]:
    """Return the installed plug-ins without those that are broken, of which a warning tells."""
    plugins = []
    for name, entry in sorted(_entries().items()):
        plugin = _load(entry)
        if isinstance(plugin, str):
            warn_once(f"left out: the plug-in {name} {plugin}")
        else:
            plugins.append(plugin)
    return plugins


@functools.cache
def _load(entry: EntryPoint) -> Plugin | str:
    """Import a plug-in, or say what is wrong with it: it is somebody's code, so anything may be."""
    try:
        plugin = entry.load()
    except Exception as error:
        return f"cannot be imported: {error}"
    if not isinstance(plugin, Plugin):
        return f"lacks something of unicl.config.Plugin: {entry.value}"
    if plugin.name != entry.name:
        return f"calls itself {plugin.name}: {entry.value}"
    if plugin.evaluations and not isinstance(plugin, Medium | Skill):
        return f"lacks something of unicl.config.Medium or Skill: {entry.value}"
    return plugin


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning of one line, the first time only."""
    logger.warning("%s", " ".join(message.split()))


def find_holder(spec: str) -> Medium | None:
    """Return the plug-in whose medium a set or folder holds; None where these are images."""
    return next((medium for medium in _media() if medium.holds(spec)), None)


def find_medium(name: str) -> Medium:
    """Return an installed plug-in of a medium.

    Raises:
        UsageError: There is none of this name.
        UniclError: It is broken.
    """
    plugin = find_plugin(name) if name in _entries() else None
    if not isinstance(plugin, Medium):
        known = ", ".join(medium.name for medium in _media()) or "none"
        raise UsageError(f"there is no medium {name!r} besides images; installed: {known}")
    return plugin


def _media() -> list[Medium]:
    return [plugin for plugin in working_plugins() if isinstance(plugin, Medium)]


def find_picture(encoded: bytes) -> bytes | None:
    """Return the image file by which a plug-in shows an encoded file; None where none does.

    Raises:
        UniclError: The file is damaged.
    """
    pictures = (medium.picture(encoded) for medium in _media())
    return next((picture for picture in pictures if picture is not None), None)


def split_evaluation(task: str) -> tuple[Plugin | None, str]:
    """Part `video-retrieval` into the plug-in and its evaluation; none is of the core."""
    name, dash, evaluation = task.partition("-")
    return (find_plugin(name), evaluation) if dash and name in _entries() else (None, task)


def evaluation_names() -> tuple[str, ...]:
    """List the evaluations of all plug-ins, as `unicl eval` takes them."""
    return tuple(f"{each.name}-{own}" for each in working_plugins() for own in each.evaluations)


def recipe_class(task: str) -> type[Recipe]:
    """Return the class of a task's recipes."""
    return Recipe if task == PRETRAINING else find_plugin(task).recipe
