"""The two ways a simulated launch can fail."""


class PTXError(RuntimeError):
    """The kernel did something that a GPU would fault on, or that is undefined."""


class Unsupported(NotImplementedError):
    """The PTX uses something that this simulator does not implement."""
