"""Laws 1 to 4 as ``mixers check`` knows them, for every kernel, dtype and array library.

truth     equals the float64 reference, forward and every gradient
cuts      cut anywhere, carry the state on and gradients back: nothing changes
steps     token by token through ``Mixer.step`` is the same mixer
packs     sequences in one row are what they are alone
strides   transposed, strided and read-only arrays are what contiguous ones are
hard      strong gates, hard resets, keys that are alike, values of any norm, nothing left to learn
wide      heads of up to 256 keys and values
"""

from mixers.check import Case

LAWS = ("truth", "cuts", "steps", "packs", "strides", "hard", "wide")


def test_law(case: Case) -> None:
    verdict = case.run()
    assert verdict, verdict.reason
