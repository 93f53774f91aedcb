"""How a layer feeds each mixer: custom rather than mathematics, so it stands here and not in the spec.

    rows        what q and k are scaled to: norm 1 (a recurrence that writes k vᵀ stays bounded), or norm √K
    activation  SiLU on q, k and v behind the convolution
    rotary      turn q and k by their positions
    rate        the upper end of beta's range is divided by this power of K

``MixerLayer`` reads it.
"""

from dataclasses import dataclass

from mixers.spec import MixerSpec, Options


@dataclass(frozen=True)
class Convention:
    """See the module."""

    unit_rows: bool = True
    activation: bool = True
    rotary: bool = False
    rate: float = 0.0


RECURRENCE = Convention()
# A cache has no order of its own, and a softmax wants logits of a natural size.
CACHE = Convention(unit_rows=False, activation=False, rotary=True)
# The inner model maps keys to values of norm √K, and its learning rate is 1/K (arXiv 2407.04620).
_TTT = Convention(unit_rows=False, activation=False, rate=1.0)
_BY_NAME = {"ttt_linear": _TTT, "ttt_mlp": _TTT}


def convention(spec: MixerSpec, options: Options) -> Convention:
    """The custom of a mixer; a mixer that nobody has named here is fed as a recurrence, or as a cache if it is one.

    A composition is fed as its first part is.
    """
    if spec.parts(options):
        return convention(*spec.parts(options)[0])
    return _BY_NAME.get(spec.name, RECURRENCE if spec.reserve is None else CACHE)
