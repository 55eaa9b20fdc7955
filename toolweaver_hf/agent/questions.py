"""Calls that wait for an answer of the client, for protocol versions without server-to-client requests.

Since the protocol version of 2026, the client receives a server's question as the result of its call, and repeats the
call with the answer. In between, the call to the server, which uses an older version, stays open.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio


if TYPE_CHECKING:
    from anyio.abc import TaskGroup


STATE_PREFIX = "toolweaver-"


class WaitingCalls:
    """Runs calls that may pause for a question, and resumes them with the answer.

    Args:
        tasks (`TaskGroup`): The task group of the calls.
        time_limit (`float`): Time limit of an answer, in seconds.
    """

    def __init__(self, tasks: TaskGroup, time_limit: float):
        self._tasks, self._time_limit = tasks, time_limit
        self._waiting: dict[str, _WaitingCall] = {}

    def __contains__(self, state: object) -> bool:
        return state in self._waiting

    async def begin(
        self, client: str, call: Callable[[Callable[[Any], Awaitable[Any]]], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """Start a call; return its result, or a question.

        Args:
            client (`str`): Identifier of the client.
            call (`Callable`): Makes the call, given a function that asks the client.
        """
        waiting = _WaitingCall(client)
        self._tasks.start_soon(waiting.run, call)
        return await self._next(waiting)

    async def go_on(self, client: str, state: str, answers: dict[str, Any] | None) -> dict[str, Any]:
        """Resume a call with an answer; return its result, or its next question."""
        waiting = self._waiting[state]
        if waiting.client != client:  # the state belongs to another client's call
            raise PermissionError("this call belongs to another client")
        del self._waiting[state]
        waiting.answer(next(iter((answers or {}).values()), None))
        return await self._next(waiting)

    async def _next(self, waiting: _WaitingCall) -> dict[str, Any]:
        try:
            question = await waiting.step()
        except BaseException:
            waiting.scope.cancel()  # the client cancelled, or the call failed
            raise
        if question is None:
            return waiting.result
        state = f"{STATE_PREFIX}{uuid.uuid4().hex}"
        self._waiting[state] = waiting
        self._tasks.start_soon(self._forget, state)
        return {"resultType": "input_required", "inputRequests": {"question": question}, "requestState": state}

    async def _forget(self, state: str) -> None:
        await anyio.sleep(self._time_limit)
        waiting = self._waiting.pop(state, None)
        if waiting is not None:
            waiting.scope.cancel()


class _WaitingCall:
    def __init__(self, client: str):
        self.client = client
        self.scope = anyio.CancelScope()
        self.result: dict[str, Any] = {}
        self._error: Exception | None = None
        self._turn, self._steps = anyio.create_memory_object_stream[Any](1)
        self._to_asker, self._answers = anyio.create_memory_object_stream[Any](1)

    async def run(self, call: Callable[[Callable[[Any], Awaitable[Any]]], Awaitable[dict[str, Any]]]) -> None:
        with self.scope:
            try:
                self.result = await call(self._ask)
            except Exception as error:
                self._error = error
        if self.scope.cancelled_caught:
            self._error = TimeoutError("the call was given up")
        # The client may no longer be waiting.
        with self._turn, self._to_asker, self._answers, suppress(anyio.WouldBlock, anyio.BrokenResourceError):
            self._turn.send_nowait(None)

    async def _ask(self, question: dict[str, Any]) -> Any:
        await self._turn.send(question)
        return await self._answers.receive()

    def answer(self, answer: Any) -> None:
        with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):  # the call has ended in the meantime
            self._to_asker.send_nowait(answer)

    async def step(self) -> dict[str, Any] | None:
        """Wait for the next question; `None` once the call has its result. Raises the call's error."""
        question = await self._steps.receive()
        if question is None:
            self._steps.close()
            if self._error is not None:
                raise self._error
        return question
