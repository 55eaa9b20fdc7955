"""Calendar, tasks, notes and time, over a small fixed diary."""

import datetime

from .places import TODAY, draw, find_city


EVENTS = {0: ["stand-up 09:15", "design review 14:00"], 1: ["dentist 08:30"], 2: ["budget talk 11:00", "yoga 18:30"]}
TASKS = {
    "file the tax form": 1,
    "water the plants": 0,
    "write the report": 2,
    "call the landlord": 5,
    "renew passport": 9,
}
NOTES = {"wifi": "The guest password is on the fridge.", "gift": "Mara likes blue pottery.", "door": "Code 4711."}
HOLIDAYS = {"Germany": "2026-10-03", "France": "2026-07-14", "United States": "2026-07-04", "Spain": "2026-08-15"}


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a date; write it as YYYY-MM-DD") from None


def _reference(*key: object) -> str:
    return f"{int(draw(*key) * 9000) + 1000}"


def list_events(days: int = 0) -> dict:
    """List the appointments in my calendar on a day.

    Args:
        days: How many days ahead; 0 is today.
    """
    return {"date": str(TODAY + datetime.timedelta(days)), "events": EVENTS.get(days, [])}


def find_free_slot(minutes: int, days: int = 0) -> dict:
    """Find a gap in my calendar that is long enough for something.

    Args:
        minutes: Length of the gap in minutes.
        days: How many days ahead; 0 is today.
    """
    if not 5 <= minutes <= 480:
        raise ValueError("a slot has 5 to 480 minutes")
    start = 10 * 60 + 30 * len(EVENTS.get(days, []))
    return {
        "from": f"{start // 60:02d}:{start % 60:02d}",
        "to": f"{(start + minutes) // 60:02d}:{(start + minutes) % 60:02d}",
    }


def create_event(title: str, date: str, time: str = "09:00") -> dict:
    """Put a new appointment into my calendar.

    Args:
        title: What the appointment is about.
        date: Day of the appointment, as YYYY-MM-DD.
        time: Time of the day, as HH:MM.
    """
    return {"event": title, "when": f"{_date(date)} {time}", "id": _reference("event", title, date)}


def cancel_event(title: str) -> dict:
    """Take an appointment out of my calendar and tell the guests that it is off.

    Args:
        title: What the appointment is about.
    """
    return {"cancelled": title, "guests_told": int(6 * draw("guests", title))}


def reschedule_event(title: str, date: str) -> dict:
    """Move an appointment to another day.

    Args:
        title: What the appointment is about.
        date: The new day, as YYYY-MM-DD.
    """
    return {"event": title, "moved_to": str(_date(date))}


def public_holidays(country: str) -> dict:
    """Give the next public holiday of a country.

    Args:
        country: Name of the country.
    """
    date = _date(HOLIDAYS.get(country, "2026-12-25"))
    return {"date": str(date), "weekday": date.strftime("%A"), "days_away": (date - TODAY).days}


def working_days(start: str, end: str) -> dict:
    """Count the working days between two dates, weekends left out.

    Args:
        start: First day, as YYYY-MM-DD.
        end: Last day, as YYYY-MM-DD.
    """
    first, last = _date(start), _date(end)
    if last < first:
        raise ValueError("the last day lies before the first")
    days = [first + datetime.timedelta(n) for n in range((last - first).days + 1)]
    return {"working_days": sum(day.weekday() < 5 for day in days), "days": len(days)}


def countdown(date: str) -> dict:
    """Count how many days and weeks are left until a date.

    Args:
        date: The date, as YYYY-MM-DD.
    """
    days = (_date(date) - TODAY).days
    return {"days": days, "weeks": round(days / 7, 1)}


def week_number(date: str) -> dict:
    """Tell the calendar week and the weekday of a date.

    Args:
        date: The date, as YYYY-MM-DD.
    """
    day = _date(date)
    return {"week": day.isocalendar().week, "weekday": day.strftime("%A")}


def add_task(task: str, days: int = 7) -> dict:
    """Add an item to my to-do list with the day on which it is due.

    Args:
        task: What is to be done.
        days: In how many days it is due.
    """
    return {"task": task, "due": str(TODAY + datetime.timedelta(days)), "open_tasks": len(TASKS) + 1}


def list_tasks(days: int = 7) -> dict:
    """List the open items of my to-do list that are due soon.

    Args:
        days: Within how many days they are due.
    """
    return {"tasks": [task for task, due in TASKS.items() if due <= days]}


def complete_task(task: str) -> dict:
    """Tick an item of my to-do list off as done.

    Args:
        task: What was done.
    """
    return {"done": task, "open_tasks": len(TASKS) - 1}


def set_reminder(text: str, time: str) -> dict:
    """Remind me of something at a time of the day.

    Args:
        text: What to be reminded of.
        time: Time of the day, as HH:MM.
    """
    return {"reminder": text, "at": time}


def start_timer(minutes: int) -> dict:
    """Start a kitchen timer that rings after some minutes.

    Args:
        minutes: Length in minutes.
    """
    if minutes < 1:
        raise ValueError("a timer needs at least one minute")
    return {"running": True, "rings_in_seconds": 60 * minutes}


def take_note(text: str) -> dict:
    """Write a note down for later.

    Args:
        text: What to write down.
    """
    return {"saved": True, "words": len(text.split()), "note": _reference("note", text)}


def search_notes(word: str) -> dict:
    """Search my written notes for a word.

    Args:
        word: What to look for.
    """
    found = [note for key, note in NOTES.items() if word.lower() in key or word.lower() in note.lower()]
    return {"found": len(found), "note": found[0] if found else "nothing"}


def local_time(city: str) -> dict:
    """Tell what time it is in a city when it is noon in universal time.

    Args:
        city: Name of the city.
    """
    minutes = int(60 * (12 + find_city(city).utc_offset)) % 1440
    return {"time": f"{minutes // 60:02d}:{minutes % 60:02d}", "utc_offset": find_city(city).utc_offset}


def convert_time(time: str, origin: str, destination: str) -> dict:
    """Convert a time of the day from one city's time zone to another's.

    Args:
        time: Time of the day, as HH:MM.
        origin: City whose clock shows this time.
        destination: City whose time is wanted.
    """
    hours, _, minutes = time.partition(":")
    shift = find_city(destination).utc_offset - find_city(origin).utc_offset
    total = int(int(hours) * 60 + int(minutes or 0) + 60 * shift) % 1440
    return {"time": f"{total // 60:02d}:{total % 60:02d}", "shift_hours": shift}


def meeting_overlap(first: str, second: str) -> dict:
    """Find the hours in which offices in two cities are both open, from nine to five.

    Args:
        first: One city.
        second: The other city.
    """
    shift = find_city(second).utc_offset - find_city(first).utc_offset
    start, end = max(9, 9 - shift), min(17, 17 - shift)
    return {"hours": max(0, end - start), "from": f"{int(start):02d}:00"}


def book_room(people: int, time: str) -> dict:
    """Book a meeting room in the office.

    Args:
        people: How many people will come.
        time: Time of the day, as HH:MM.
    """
    if people > 40:
        raise ValueError("the largest room holds 40 people")
    room = "Cedar" if people <= 6 else "Maple" if people <= 14 else "Great Hall"
    return {"room": room, "at": time}
