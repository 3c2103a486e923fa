"""Errors of experiments, deployments and proofs."""

from common.errors import WdmoeError


class PlanError(WdmoeError):
    """The plan of an experiment is not valid."""

    exit_code = 60


class RunDirectoryError(WdmoeError):
    """A folder is missing, in use, or not a run directory."""

    exit_code = 61


class PreflightError(WdmoeError):
    """This machine or its nodes can't run a plan."""

    exit_code = 62


class FailedCellsError(WdmoeError):
    """A run ended, but some of its cells failed."""

    exit_code = 63


class PrivilegeError(WdmoeError):
    """This process lacks the rights that emulated networks need."""

    exit_code = 64


class NetworkSpecError(WdmoeError):
    """The description of an emulated network is not valid."""

    exit_code = 65


class NetworkError(WdmoeError):
    """An emulated network is not up, does not come up, or differs from its configuration."""

    exit_code = 66


class SimulationError(WdmoeError):
    """A radio setting or a routing trace can't be used."""

    exit_code = 67


class ChaosError(WdmoeError):
    """An answer under faults was wrong, hung or crashed."""

    exit_code = 68


class MachineError(WdmoeError):
    """Machines for testing deployment can't be made, or do not come up."""

    exit_code = 71


class FleetError(WdmoeError):
    """The inventory is not valid, or deployment failed on some hosts."""

    exit_code = 72


class EmulationError(WdmoeError):
    """Another processor can't be emulated on this machine."""

    exit_code = 73


class AgreementError(WdmoeError):
    """Results of an emulated processor differ from this one's by more than the tolerance."""

    exit_code = 74


class ArchiveError(WdmoeError):
    """The archive of a run is damaged, unsafe, or can't be written."""

    exit_code = 75
