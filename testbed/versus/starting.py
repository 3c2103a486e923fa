"""Starts all arms on one network: ours in turn, other programs' all at once."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from common.errors import WdmoeError
from testbed.network.bypass import bypass
from testbed.network.emulated import EmulatedNetwork
from testbed.versus.arms import OURS, Arm
from testbed.versus.asking import Asker, why_ended
from testbed.versus.client import AnswerEndedError
from testbed.versus.programs import RunningArm
from testbed.versus.settings import Settings


class Starter:
    """Starts arms; this thread is on the base station."""

    def __init__(self, settings: Settings, network: EmulatedNetwork, asker: Asker, channel: str) -> None:
        """Nothing is started yet.

        Args:
            channel: folder of the logs among all logs.
        """
        self._settings = settings
        self._network = network
        self._asker = asker
        self._logs = settings.folder / "logs" / channel

    def start(self, arms: Sequence[Arm], stack: ExitStack) -> Mapping[str, RunningArm | str]:
        """Start all arms and ask each for a first answer; those that run end with `stack`.

        Returns:
            By arm, in the order of `arms`: the arm, or why it does not run.
        """
        ours, others = ([arm for arm in arms if (arm.name in OURS) == of_ours] for of_ours in (True, False))
        started = {arm.name: self._start_one(self._made(arm, stack)) for arm in ours}
        if others:
            # Processes end with the thread that started them, so the threads stay until all arms have ended. They
            # inherit this thread's network and cores.
            pool = stack.enter_context(ThreadPoolExecutor(len(others)))
            made = [self._made(arm, stack) for arm in others]
            # They send the whole model to their workers, which the links would make the longest part of a run.
            with bypass(self._network.spec):
                started |= zip((arm.name for arm in others), pool.map(self._start_one, made), strict=True)
        return {arm.name: started[arm.name] for arm in arms}

    def _made(self, arm: Arm, stack: ExitStack) -> RunningArm:
        """An arm that is not started yet, and ends with `stack`."""
        made = RunningArm(arm, self._prefix, self._logs / arm.name, self._settings.threads)
        stack.callback(made.stop)
        return made

    def _start_one(self, one: RunningArm) -> RunningArm | str:
        name = one.arm.name
        self._settings.say(f"starting {name}")
        began_s = time.monotonic()
        try:
            one.start(self._settings.start_s)
            ready_s = time.monotonic() - began_s
            self._asker.warm_up(one)
        except AnswerEndedError as error:
            why = f"{error.outcome}: {why_ended(error, one)}"
            one.stop()
            return why
        except WdmoeError as error:
            one.stop()
            return str(error)
        self._settings.say(f"{name} was ready after {ready_s:.1f} s and warm after {time.monotonic() - began_s:.1f} s")
        return one

    def _prefix(self, device: str) -> Sequence[str]:
        """Words before a command, so that it runs on a device; the base station needs none."""
        settings = self._settings
        if device not in settings.devices:
            return ()
        core = settings.cores and settings.cores.nodes[settings.devices.index(device)]
        return [*self._network.prefix(device), *(() if core is None else ("taskset", "-c", str(core)))]
