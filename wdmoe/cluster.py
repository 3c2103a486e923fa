"""A cluster that answers: broker, nodes and the base station in this process."""

import atexit
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bs_coordinator.commands.station import open_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from common.config import ConfigError, config_fields
from common.errors import WdmoeError
from common.extras import needs_extra
from common.options import checked_config
from wdmoe.main_guard import check_main_guard, end_if_importing

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation
    from bs_coordinator.page.documents import NodeView
    from wdmoe.answers import Answer, TokenStream
    from wdmoe.session import EventStream, Session

AnyPath = str | PathLike[str]
Message = Mapping[str, str]
"""One message of a conversation: `{"role": "user", "content": "…"}`."""

_MOST_LOCAL_NODES = 256
_SAMPLING = tuple(field.name for field in config_fields(SamplingConfig) if field.option is not None)


class Cluster:
    """A base station in this process, and the nodes that it asks.

    Use it as a context, or call `open` and `close`, which suits notebooks. Its methods may be called from several
    threads; answers that run at the same time share their steps.

    Raises:
        ConfigError: an option is wrong.
        MissingPackageError: `wdmoe[bs]` is not installed.
    """

    def __init__(self, bundle: AnyPath, broker: str, **options: Any) -> None:
        """Nothing is started or connected before the cluster is opened.

        Args:
            bundle: folder of the model's bundle.
            broker: URL of the broker that the nodes use, such as `mqtts://bs@broker.local`.
            options: further options of `wdmoe-bs generate`, with `_` for `-`: `policy="subset"`,
                `nodes_timeout=120`, `password_file="secret"`.
        """
        with needs_extra("bs"):
            self._config: BaseStationConfig = checked_config(
                BaseStationConfig, {"bundle": bundle, "broker": broker, **options}
            )
        self._opener: Callable[[], AbstractContextManager[BaseStation]] = lambda: open_station(self._config)
        self._extra = "bs"
        self._stack = ExitStack()
        self._session: Session | None = None

    @classmethod
    def local(
        cls, bundle: AnyPath | None = None, *, model: str = "mixtral", nodes: int = 8, broker: str = "embedded",
        logs: AnyPath | None = None, **options: Any,
    ) -> "Cluster":  # fmt: skip
        """A cluster of node processes on this machine, as `wdmoe-testbed up` starts them; they end with the cluster.

        Args:
            bundle: folder of the model's bundle; None for a demo model's, which is made if it is missing.
            model: which of the demo models.
            nodes: number of node processes; node k holds experts k, k + nodes, … of every layer.
            broker: `embedded`, `mosquitto`, or the URL of one that is running.
            logs: folder for the nodes' logs; None for a temporary one.
            options: as for a `Cluster`.

        Raises:
            ConfigError: an option is wrong.
            MissingPackageError: `wdmoe[testbed]` is not installed.
        """
        with needs_extra("testbed"):
            from exporter.demo_model.assembly import DEMO_MODELS
            from testbed.demo.up import local_fleet
            from testbed.demo_assets import demo_bundle_path
        if model not in DEMO_MODELS:
            raise ConfigError(f"model: '{model}' is not one of {', '.join(DEMO_MODELS)}")
        if not 1 <= nodes <= _MOST_LOCAL_NODES:
            raise ConfigError(f"nodes: {nodes} is not from 1 to {_MOST_LOCAL_NODES}")
        demo = model if bundle is None else None

        @contextmanager
        def station() -> "Iterator[BaseStation]":
            end_if_importing()
            with ExitStack() as stack:
                folder = logs or stack.enter_context(tempfile.TemporaryDirectory(prefix="wdmoe-nodes-"))
                try:
                    started, _ = stack.enter_context(
                        local_fleet(cluster._config, demo=demo, nodes=nodes, logs=Path(folder))
                    )
                except WdmoeError:
                    if demo is not None:
                        check_main_guard()  # without a guard, the error is that of a process that could not start
                    raise
                yield started

        cluster = cls(demo_bundle_path("int4", model=model) if bundle is None else bundle, broker, **options)
        cluster._opener = station
        cluster._extra = "testbed"
        return cluster

    def open(self) -> "Cluster":
        """Connect, load the model, and wait until every expert has a node; returns the cluster.

        Raises:
            BrokerError: the broker can't be reached.
            PlacementError: some expert has no node after `nodes_timeout` (60 s).
            BundleError: the bundle is missing or damaged.
            MissingPackageError: `wdmoe[bs]` is not installed.
            WdmoeError: another part can't be started.
        """
        if self._session is not None:
            return self
        with ExitStack() as stack:
            with needs_extra(self._extra):
                station = stack.enter_context(self._opener())
                from wdmoe.session import Session

            session = Session(station)
            session.start()
            stack.callback(session.stop)
            self._stack, self._session = stack.pop_all(), session
        # For notebooks and shells that end without it: a node's process must not outlive them.
        atexit.register(self.close)
        return self

    def close(self) -> None:
        """End running answers with an error, disconnect, and end what was started; nothing happens the second time."""
        atexit.unregister(self.close)
        self._session = None
        self._stack.close()

    def __enter__(self) -> "Cluster":
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self, prompt: str, *, system: str | None = None, raw: bool = False, policy: str | None = None, **sampling: Any
    ) -> "Answer":
        """Answer a prompt.

        Args:
            system: system prompt of a chat model.
            raw: continue the prompt as plain text, without the model's chat template.
            policy: chooses the experts (docs/policies.md); None for the cluster's own. Answers with different ones
                take turns, and there are no drafts with another than the cluster's.
            sampling: `max_tokens` (256), `temperature` (0: always the most probable token), `top_p` (1), `seed` (0).

        Raises:
            ConfigError: an option is wrong, or the prompt is empty.
            ContextLengthError: the prompt is longer than the model's context.
            ChatTemplateError: the model's chat template refuses the system prompt.
            DispatchError: nodes failed, and no other one holds their experts.
            WdmoeError: another failure of this answer, as the command `wdmoe-bs generate` reports it.
        """
        return _answer(self._events(prompt, system=system, raw=raw, policy=policy, sampling=sampling))

    def chat(self, messages: Iterable[Message], *, policy: str | None = None, **sampling: Any) -> "Answer":
        """Answer the last message of a conversation: `[{"role": "user", "content": "…"}, …]`.

        Arguments and errors are those of `generate`.
        """
        return _answer(self._events(list(messages), policy=policy, sampling=sampling))

    def stream(
        self, prompt: str | Iterable[Message], *, system: str | None = None, raw: bool = False,
        policy: str | None = None, **sampling: Any,
    ) -> "TokenStream":  # fmt: skip
        """Answer a prompt or a conversation token by token; the answer begins at once.

        Arguments and errors are those of `generate`. Leaving the loop ends the answer.
        """
        events = self._events(
            prompt if isinstance(prompt, str) else list(prompt), system=system, raw=raw, policy=policy,
            sampling=sampling,
        )  # fmt: skip
        from wdmoe.answers import TokenStream

        return TokenStream(events)

    def nodes(self) -> "list[NodeView]":
        """The nodes, by name: state, host, experts, and the estimates of their links.

        `bs_coordinator.page.documents.NodeView` describes the fields.
        """
        return self._opened().nodes()

    def levers(self) -> dict[str, str]:
        """What the option `preset` chose, by option, after the preset's own name; empty without one."""
        return self._opened().station.levers

    def _opened(self) -> "Session":
        if self._session is None:
            raise WdmoeError("the cluster is not open: use 'with Cluster(…) as cluster:', or call open()")
        return self._session

    def _events(
        self, prompt: str | list[Message], *, policy: str | None, sampling: Mapping[str, Any],
        system: str | None = None, raw: bool = False,
    ) -> "EventStream":  # fmt: skip
        session = self._opened()
        config: SamplingConfig = checked_config(SamplingConfig, sampling)
        tokenizer = session.station.tokenizer
        if isinstance(prompt, str):
            raw = raw or not tokenizer.has_chat_template
            if system and raw:
                raise ConfigError("system: plain text has no system prompt: put it into the prompt")
            messages = [{"role": "system", "content": system}] if system else []
            messages += [{"role": "user", "content": prompt}]
        elif system or raw:
            raise ConfigError("system and raw: a conversation has its own system message and is never plain text")
        elif not tokenizer.has_chat_template:
            raise ConfigError("this model has no chat template: ask it with generate")
        else:
            messages = _checked(prompt)
        if not messages or not messages[-1]["content"].strip():
            raise ConfigError("the prompt is empty")
        ids = tokenizer.encode(messages[-1]["content"]) if raw else tokenizer.encode_chat(messages)
        return session.answer(ids, config, policy=policy, same_text=raw)


def _checked(messages: list[Message]) -> list[dict[str, str]]:
    for message in messages:
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys()):
            raise ConfigError('messages: each must be {"role": "user", "content": "…"}')
        if not all(isinstance(message[key], str) for key in ("role", "content")):
            raise ConfigError("messages: role and content must be text")
    return [dict(message) for message in messages]


def _answer(events: "EventStream") -> "Answer":
    from wdmoe.answers import Answer

    return Answer.of(list(events))


def generate(prompt: str, bundle: AnyPath, broker: str, **options: Any) -> "Answer":
    """Answer one prompt: open a cluster, ask it, and close it again.

    Args:
        bundle, broker: as for a `Cluster`.
        options: of the cluster and of `Cluster.generate`.

    Raises:
        WdmoeError: as `Cluster.open` and `Cluster.generate`.
    """
    asked = {name: options.pop(name) for name in ("system", "raw", *_SAMPLING) if name in options}
    with Cluster(bundle, broker, **options) as cluster:
        return cluster.generate(prompt, **asked)
