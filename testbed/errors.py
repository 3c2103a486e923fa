"""Errors of experiments, deployments and proofs."""

from common.errors import WdmoeError


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


class SimulationError(WdmoeError):
    """A radio setting or a routing trace can't be used."""

    exit_code = 67


class ChaosError(WdmoeError):
    """Under faults an answer was wrong, hung or crashed."""

    exit_code = 68


class MachineError(WdmoeError):
    """Machines to try deployment on can't be made, or do not come up."""

    exit_code = 71


class FleetError(WdmoeError):
    """A deployment can't be made as the inventory says, or failed on some hosts."""

    exit_code = 72


class EmulationError(WdmoeError):
    """Another processor can't be emulated here."""

    exit_code = 73


class AgreementError(WdmoeError):
    """An emulated processor computes something else than this one."""

    exit_code = 74


class ArchiveError(WdmoeError):
    """A run's archive is damaged, unsafe, or can't be made as asked."""

    exit_code = 75
