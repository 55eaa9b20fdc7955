"""Calls over which a server asks the client something, for clients whose protocol has no requests of servers.

Since the protocol's version of 2026, such a client gets the question as the result of its call and calls again with the
answer. The call to the server, which knows an older version, has to wait in between.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio


if TYPE_CHECKING:
    from anyio.abc import TaskGroup


class WaitingCalls:
    """Runs calls that may stop for a question and goes on with them when the answer comes.

    Args:
        tasks (`TaskGroup`): Where the calls run, from their first question on without anybody who awaits them.
        time_limit (`float`): Seconds that an answer may take.
    """

    def __init__(self, tasks: TaskGroup, time_limit: float):
        self._tasks, self._time_limit = tasks, time_limit
        self._waiting: dict[str, _WaitingCall] = {}

    def __contains__(self, state: object) -> bool:
        return state in self._waiting

    async def begin(
        self, client: str, call: Callable[[Callable[[Any], Awaitable[Any]]], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """Make a call; return its result, or a question.

        Args:
            client (`str`): Who calls.
            call (`Callable`): Makes the call, and is given the function that asks the client.
        """
        waiting = _WaitingCall(client)
        self._tasks.start_soon(waiting.run, call)
        return await self._next(waiting)

    async def go_on(self, client: str, state: str, answers: dict[str, Any] | None) -> dict[str, Any]:
        """Give a waiting call its answer; return its result, or its next question."""
        waiting = self._waiting[state]
        if waiting.client != client:  # the state of another client's call
            raise PermissionError("this call belongs to another client")
        del self._waiting[state]
        waiting.answer(next(iter((answers or {}).values()), None))
        return await self._next(waiting)

    async def _next(self, waiting: _WaitingCall) -> dict[str, Any]:
        try:
            question = await waiting.step()
        except BaseException:
            waiting.scope.cancel()  # the client gave up, or the call has failed
            raise
        if question is None:
            return waiting.result
        state = f"toolweaver-{uuid.uuid4().hex}"
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
        # Where nobody listens any more, there is nobody to tell.
        with self._turn, self._to_asker, self._answers, suppress(anyio.WouldBlock, anyio.BrokenResourceError):
            self._turn.send_nowait(None)

    async def _ask(self, question: dict[str, Any]) -> Any:
        await self._turn.send(question)
        return await self._answers.receive()

    def answer(self, answer: Any) -> None:
        with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):  # the call has ended in the meantime
            self._to_asker.send_nowait(answer)

    async def step(self) -> dict[str, Any] | None:
        """Wait for the next question; `None` is the end, with the result or the error that is raised."""
        question = await self._steps.receive()
        if question is None:
            self._steps.close()
            if self._error is not None:
                raise self._error
        return question
