"""Every failure that a user can cause or meet, each with its own exit code.

    WdmoeError                    1
    ├── CheckpointError          10   the source checkpoint is missing, broken or not a Mixtral
    ├── BundleError              11   a bundle is missing, incomplete, tampered with or of another version
    │   └── SignatureError       14   a bundle is not signed, or not by the key that was given
    ├── StorageError             12   a file could not be written (disk full, no permission)
    ├── DownloadError            13   something that had to be fetched could not be, or has the wrong hash
    ├── MemoryBudgetError        20   the experts do not fit into this device's memory
    ├── ProbeError               21   an expert computes something else here than where it was exported
    ├── DuplicateNodeError       22   another live node uses this id
    ├── TuningError              23   no bundle suits this device, or a tuning file is none
    ├── BrokerError              30   the broker can't be reached or was lost
    │   ├── BrokerAuthError      31   the broker refused user or password
    │   ├── BrokerDelayError     32   round trips show the 40 ms of a missing TCP_NODELAY
    │   └── PlaintextError       33   a broker beyond loopback without TLS, and nobody said that this is meant
    ├── PlacementError           40   no node holds an expert that the model needs
    ├── DispatchError            41   a node failed or did not answer before the deadline
    │   └── ExpertsLostError     41   … and nobody else holds what it was asked for
    ├── ContextLengthError       42   the prompt is longer than the model's context
    ├── ShapingError             43   the down-link can't be shaped as asked
    ├── BusyError                44   more is asked at once than is served
    ├── ServeError               45   the HTTP interface can't be opened as asked
    ├── TrunkError               46   the trunk can't run on the device that was asked for, or its GPU failed
    ├── FrameError               50   bytes that are not a valid frame (counted and dropped, rarely fatal)
    ├── KeyFileError             51   a key file is missing, not one, or can be read by others
    ├── PlanError                60   an experiment's plan is wrong
    ├── RunDirectoryError        61   a run directory is missing, in use, or not one
    ├── PreflightError           62   this machine or its nodes can't run a plan
    ├── FailedCellsError         63   a run went to its end, but some of its cells failed
    ├── PrivilegeError           64   emulated networks need rights that this process lacks
    ├── NetworkSpecError         65   the description of an emulated network is wrong
    ├── NetworkError             66   an emulated network is not up, or not what was configured
    ├── SimulationError          67   a radio setting or a routing trace can't be used
    ├── ChaosError               68   under faults an answer was wrong, hung or crashed
    ├── FuzzError                69   a reader neither understood nor refused an input
    ├── MachineError             71   machines to try deployment on can't be made or do not come up
    ├── FleetError               72   a deployment can't be made, or failed on some hosts
    ├── EmulationError           73   another processor can't be emulated here
    ├── AgreementError           74   an emulated processor computes something else than this one
    └── ArchiveError             75   a run's archive is damaged, unsafe, or can't be made as asked

Exit code 2 is click's own for a malformed command line; 70 is a defect of ours; 130 is Ctrl-C.
"""


def one_line(error: Exception) -> str:
    """What an error of any library says, without line breaks; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class WdmoeError(Exception):
    """Base of all errors of this project: `str(error)` is the one line that the user reads."""

    exit_code = 1


class CheckpointError(WdmoeError):
    """The source checkpoint is missing, broken or not a Mixtral."""

    exit_code = 10


class BundleError(WdmoeError):
    """A bundle is missing, incomplete, tampered with or of another schema version."""

    exit_code = 11


class SignatureError(BundleError):
    """A bundle is not signed, or not by the key that was given."""

    exit_code = 14


class StorageError(WdmoeError):
    """A file could not be written."""

    exit_code = 12


class DownloadError(WdmoeError):
    """Something that had to be fetched could not be, or has the wrong hash."""

    exit_code = 13


class MemoryBudgetError(WdmoeError):
    """The experts do not fit.

    Attributes:
        needed_bytes: what the chosen experts would take once loaded.
        available_bytes: what may be used.
    """

    exit_code = 20

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class ProbeError(WdmoeError):
    """An expert computes something else on this device than where it was exported."""

    exit_code = 21


class DuplicateNodeError(WdmoeError):
    """Another live node uses this id."""

    exit_code = 22


class TuningError(WdmoeError):
    """No bundle suits this device, or a tuning file is none."""

    exit_code = 23


class BrokerError(WdmoeError):
    """The broker can't be reached or was lost."""

    exit_code = 30


class BrokerAuthError(BrokerError):
    """The broker refused user or password."""

    exit_code = 31


class BrokerDelayError(BrokerError):
    """Round trips through the broker show the signature of a missing TCP_NODELAY."""

    exit_code = 32


class PlaintextError(BrokerError):
    """A broker beyond loopback without TLS, and nobody said that this is meant."""

    exit_code = 33


class PlacementError(WdmoeError):
    """No node holds an expert that the model needs."""

    exit_code = 40


class DispatchError(WdmoeError):
    """A node failed or did not answer before the deadline."""

    exit_code = 41


class ExpertsLostError(DispatchError):
    """All holders of an expert failed or are left out for now."""


class ContextLengthError(WdmoeError):
    """The prompt is longer than the model's context."""

    exit_code = 42


class ShapingError(WdmoeError):
    """The down-link can't be shaped as asked."""

    exit_code = 43


class BusyError(WdmoeError):
    """As many requests as are allowed are being answered.

    Attributes:
        retry_after_s: when it should be worth another try.
    """

    exit_code = 44

    def __init__(self, requests: int, *, retry_after_s: float) -> None:
        super().__init__(f"busy with {requests} requests: retry after {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class ServeError(WdmoeError):
    """The HTTP interface can't be opened as asked."""

    exit_code = 45


class TrunkError(WdmoeError):
    """The trunk can't run on the device that was asked for, or its GPU failed."""

    exit_code = 46


class FrameError(WdmoeError):
    """Bytes that are not a valid frame.

    Attributes:
        reason: one of a few fixed words, for counters (`length`, `magic`, `version`, `crc`, …).
    """

    exit_code = 50

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class KeyFileError(WdmoeError):
    """A key file is missing, not one, or can be read by others."""

    exit_code = 51


class PlanError(WdmoeError):
    """An experiment's plan is wrong."""

    exit_code = 60


class RunDirectoryError(WdmoeError):
    """A run directory is missing, in use, or not one."""

    exit_code = 61


class PreflightError(WdmoeError):
    """This machine or its nodes can't run a plan."""

    exit_code = 62


class FailedCellsError(WdmoeError):
    """A run went to its end, but some of its cells failed."""

    exit_code = 63


class PrivilegeError(WdmoeError):
    """Emulated networks need rights that this process lacks."""

    exit_code = 64


class NetworkSpecError(WdmoeError):
    """The description of an emulated network is wrong."""

    exit_code = 65


class NetworkError(WdmoeError):
    """An emulated network is not up, does not come up, or is not what was configured."""

    exit_code = 66


class ChaosError(WdmoeError):
    """Under faults an answer was wrong, hung or crashed."""

    exit_code = 68


class MachineError(WdmoeError):
    """Machines to try deployment on can't be made, or do not come up."""

    exit_code = 71


class FleetError(WdmoeError):
    """A deployment can't be made as the inventory says, or failed on some hosts."""

    exit_code = 72


class FuzzError(WdmoeError):
    """A reader neither understood nor refused an input."""

    exit_code = 69


class ArchiveError(WdmoeError):
    """A run's archive is damaged, unsafe, or can't be made as asked."""

    exit_code = 75


class SimulationError(WdmoeError):
    """A radio setting or a routing trace can't be used."""

    exit_code = 67


class EmulationError(WdmoeError):
    """Another processor can't be emulated here."""

    exit_code = 73


class AgreementError(WdmoeError):
    """An emulated processor computes something else than this one."""

    exit_code = 74
