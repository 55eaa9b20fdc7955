"""Calls that wait for their client's answer."""

import anyio
import pytest

from toolweaver_hf.agent.questions import WaitingCalls


def run(test, time_limit=5.0):
    async def main():
        async with anyio.create_task_group() as tasks:
            await test(WaitingCalls(tasks, time_limit))
            tasks.cancel_scope.cancel()

    anyio.run(main)


async def ask_twice(ask):
    return {"answers": [await ask({"n": 1}), await ask({"n": 2})]}


def test_a_call_goes_on_with_its_answers():
    async def test(calls):
        first = await calls.begin("ada", ask_twice)
        assert first["inputRequests"] == {"question": {"n": 1}}
        second = await calls.go_on("ada", first["requestState"], {"question": "blue"})
        assert second["inputRequests"] == {"question": {"n": 2}}
        assert first["requestState"] not in calls
        assert await calls.go_on("ada", second["requestState"], {"question": "red"}) == {"answers": ["blue", "red"]}

    run(test)


def test_another_client_cannot_answer():
    async def test(calls):
        first = await calls.begin("ada", ask_twice)
        with pytest.raises(PermissionError):
            await calls.go_on("eve", first["requestState"], {"question": "blue"})
        assert first["requestState"] in calls

    run(test)


def test_the_error_of_a_call_is_raised():
    async def fail(ask):
        await ask({})
        raise ValueError("no such place")

    async def test(calls):
        first = await calls.begin("ada", fail)
        with pytest.raises(ValueError, match="no such place"):
            await calls.go_on("ada", first["requestState"], None)

    run(test)


def test_a_client_that_gives_up_at_any_moment_ends_its_call_alone():
    ended = []

    async def slow(ask):
        try:
            await anyio.sleep(0.01)
            await ask({})
            await anyio.sleep(60)
        finally:
            ended.append(True)

    async def test(calls):
        for seconds in (0, 0.005, 0.01, 0.0101, 0.011):
            with anyio.move_on_after(seconds):
                await calls.begin("ada", slow)
        first = await calls.begin("ada", ask_twice)
        assert first["requestState"] in calls

    run(test)
    assert ended


def test_an_answer_that_does_not_come_is_not_waited_for():
    async def test(calls):
        first = await calls.begin("ada", ask_twice)
        await anyio.sleep(0.3)
        assert first["requestState"] not in calls

    run(test, time_limit=0.1)
