"""The errors a user can meet. Each message is one sentence: what is wrong, where, and what to do."""


class CoinferError(Exception):
    """Base of every expected failure; the command line prints the message alone and exits with 1."""


class ParamsError(CoinferError):
    """A key, type or range in params.yaml, or a candidate that cannot exist."""


class DataError(CoinferError):
    """Images or their folder are missing, broken or empty."""


class ModelError(CoinferError):
    """A backbone, its weights, a cut, a channel plan or a codec does not fit."""


class ProfileError(CoinferError):
    """A device profile is missing, of another schema, or lacks what is asked of it."""


class BundleError(CoinferError):
    """A bundle is incomplete, altered, or its halves do not belong together."""


class FrameError(CoinferError):
    """A message on the wire is damaged, truncated or of another version."""


class KeysError(CoinferError):
    """Certificates or tokens are missing, broken or needed."""


class ParityError(CoinferError):
    """An exported half does not compute what the trained network computes."""


class Interrupted(CoinferError):
    """Ctrl-C in a long stage; the message says what was kept and how to go on."""
