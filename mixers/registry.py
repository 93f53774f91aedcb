"""Every mixer by name."""

from mixers import attention, delta, ham, lattice, linear, memory_caching, ttt, ttt_mlp
from mixers.spec import MixerSpec, unknown

_FAMILIES = (linear, delta, lattice, ttt, ttt_mlp, attention, ham, memory_caching)
_SPECS: dict[str, MixerSpec] = {spec.name: spec for family in _FAMILIES for spec in family.SPECS}


def names() -> tuple[str, ...]:
    """The names of all mixers."""
    return tuple(_SPECS)


def get_spec(name: str) -> MixerSpec:
    """The specification of a mixer; printing it shows its page.

    Raises:
        ValueError: no mixer has this name; the nearest one is offered.
    """
    if name not in _SPECS:
        raise ValueError(unknown("mixer", name, _SPECS))
    return _SPECS[name]


def register(spec: MixerSpec) -> MixerSpec:
    """Add a mixer of your own: it runs at once on the reference, under any array library.

    Raises:
        ValueError: the name is taken.
    """
    if spec.name in _SPECS:
        raise ValueError(f"a mixer named {spec.name!r} exists already; choose another name")
    _SPECS[spec.name] = spec
    return spec
