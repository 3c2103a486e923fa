"""Tags of frames: for one node, one direction and one start of the node; each request counts once."""

import itertools

import pytest

from wire import frames
from wire.errors import FrameError
from wire.frame_auth import ClusterKey, FrameAuthenticator, ReplayGuard
from wire.frames import PingFrame, RequestId

KEY = ClusterKey("lab", bytes(range(32)))
PING = PingFrame(RequestId(7, 1), b"are you there?", reply_bytes=4)


def _read(frame: bytes, node: str = "pi1", boot_id: str = "b1", *, at_node: bool = True) -> str:
    """`taken`, or the reason why the other end drops a frame."""
    try:
        frames.decode(frame, authenticator=FrameAuthenticator(KEY.node_key(node), boot_id, at_node=at_node))
    except FrameError as error:
        return error.reason
    return "taken"


def test_a_request_is_for_one_node_one_direction_and_one_start() -> None:
    frame = frames.encode(PING, authenticator=KEY.authenticator("pi1", "b1"))
    assert _read(frame) == "taken"
    assert _read(frame, node="pi2") == "forged"
    assert _read(frame, at_node=False) == "forged"
    for boot_id in ("b2", "", "b", "b11", "B1"):  # a restarted node, and one whose id begins the same way
        assert _read(frame, boot_id=boot_id) == "forged"


def test_a_boot_id_that_a_broker_made_up_does_not_sign_another_frame() -> None:
    """Were the tag made over `boot_id + frame`, a broker could move bytes from one into the other."""
    forged = frames.encode(PING, authenticator=KEY.authenticator("pi1", "b1" + "WDMo"))
    assert _read(forged) == "forged"


def test_answers_do_not_depend_on_what_the_status_said() -> None:
    """Answers are matched by session and request, which are new in each base station."""
    answer = frames.encode(PING, authenticator=FrameAuthenticator(KEY.node_key("pi1"), "b1", at_node=True))
    assert _read(answer, boot_id="changed by the broker", at_node=False) == "taken"


def test_each_request_counts_once_however_many_sessions_there_were() -> None:
    guard = ReplayGuard()
    sent = [(session, request, 0) for session, request in itertools.product((3, 2**64 - 1), (0, 1, 7, 2**64 - 1))]
    assert all(guard.is_new(*id) for id in sent)
    for session in range(1000, 6000):
        assert guard.is_new(session, 0, 0)
    assert not any(guard.is_new(*id) for id in sent)
    assert not guard.is_new(3, 5, 0)  # never received, but later ones were
    assert guard.is_new(4, 0, 0)


@pytest.mark.parametrize("attempt", [1, 65535])
def test_a_repetition_is_later_than_the_first_attempt(attempt: int) -> None:
    guard = ReplayGuard()
    assert guard.is_new(1, 5, 0)
    assert guard.is_new(1, 5, attempt)
    assert not guard.is_new(1, 5, attempt)
    assert not guard.is_new(1, 5, 0)
