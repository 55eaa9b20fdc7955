"""Smart home, household, garden, pets and leisure, over small tables and formulas."""

import datetime
import math

from .places import TODAY, draw


STAINS = {
    "red wine": "salt and soda water",
    "coffee": "cold water and vinegar",
    "grass": "alcohol",
    "oil": "chalk powder",
}
WASH = {"wool": (30, 35), "cotton": (60, 120), "silk": (20, 30), "sportswear": (40, 60)}


def set_lights(room: str, brightness: int) -> dict:
    """Turn the lamps in a room on, off or to a brightness.

    Args:
        room: Name of the room.
        brightness: From 0 (off) to 100.
    """
    if not 0 <= brightness <= 100:
        raise ValueError("brightness lies between 0 and 100")
    return {"room": room, "brightness": brightness}


def set_thermostat(room: str, degrees: float) -> dict:
    """Set the heating or air conditioning of a room to a temperature.

    Args:
        room: Name of the room.
        degrees: Temperature in °C.
    """
    if not 5 <= degrees <= 30:
        raise ValueError("the thermostat can be set from 5 to 30 °C")
    return {"room": room, "target_c": degrees}


def lock_door(door: str, locked: bool = True) -> dict:
    """Lock or unlock a door of the house.

    Args:
        door: Which door.
        locked: Whether it is to be locked.
    """
    return {"door": door, "locked": locked}


def start_vacuum(room: str) -> dict:
    """Send the robot vacuum cleaner to a room.

    Args:
        room: Name of the room.
    """
    return {"cleaning": room, "minutes": 10 + int(25 * draw("dust", room))}


def camera_check(place: str) -> dict:
    """Look through a security camera and report movement.

    Args:
        place: Where the camera hangs.
    """
    return {"motion": draw("motion", place) > 0.5, "last_seen": f"{int(24 * draw('seen', place)):02d}:10"}


def energy_usage(device: str) -> dict:
    """Tell how much electricity a device of the house used this month.

    Args:
        device: Name of the device.
    """
    used = round(3 + 60 * draw("kwh", device), 1)
    return {"kwh": used, "cost_eur": round(used * 0.32, 2)}


def solar_output() -> dict:
    """Tell how much power the solar panels on the roof make and what is in the battery."""
    return {"watts": 3120, "battery_percent": 74}


def set_volume(room: str, level: int) -> dict:
    """Set how loud the speakers in a room are.

    Args:
        room: Name of the room.
        level: From 0 to 10.
    """
    return {"room": room, "volume": max(0, min(10, level))}


def washing_programme(fabric: str) -> dict:
    """Choose temperature and length of the washing machine's cycle for a fabric.

    Args:
        fabric: Kind of fabric. (choices: ["wool", "cotton", "silk", "sportswear"])
    """
    return {"temperature_c": WASH[fabric][0], "minutes": WASH[fabric][1]}


def close_blinds(room: str, percent: int = 100) -> dict:
    """Lower or raise the blinds of a room.

    Args:
        room: Name of the room.
        percent: How far they are closed.
    """
    return {"room": room, "closed_percent": percent}


def remove_stain(stain: str) -> dict:
    """Tell how to get a spot out of cloth or carpet.

    Args:
        stain: What made the spot.
    """
    return {"use": STAINS.get(stain.lower(), "warm soapy water")}


def plant_care(plant: str) -> dict:
    """Tell how often a house plant wants watering and how much light.

    Args:
        plant: Name of the plant.
    """
    days = 2 + int(12 * draw("plant", plant))
    return {"water_every_days": days, "light": "full sun" if days > 8 else "half shade"}


def planting_calendar(vegetable: str) -> dict:
    """Tell in which month a vegetable is sown and harvested in the garden.

    Args:
        vegetable: Name of the vegetable.
    """
    months = ("March", "April", "May", "June", "July", "August", "September", "October")
    sow = int(3 * draw("sow", vegetable))
    return {"sow": months[sow], "harvest": months[sow + 3 + int(2 * draw("reap", vegetable))]}


def paint_needed(width: float, height: float) -> dict:
    """Compute how much paint a wall takes.

    Args:
        width: Width in metres.
        height: Height in metres.
    """
    return {"litres": math.ceil(width * height / 5) / 2, "area_m2": round(width * height, 1)}


def pet_food(animal: str, weight: float) -> dict:
    """Tell how much to feed a pet in a day.

    Args:
        animal: Kind of pet. (choices: ["dog", "cat", "rabbit"])
        weight: Weight of the pet in kilograms.
    """
    return {"grams": round(weight * {"dog": 20, "cat": 17, "rabbit": 40}[animal]), "meals": 2}


def waste_collection(kind: str) -> dict:
    """Tell on which day the bins are emptied.

    Args:
        kind: Kind of waste. (choices: ["paper", "plastic", "organic", "residual"])
    """
    date = TODAY + datetime.timedelta(1 + int(13 * draw("bin", kind)))
    return {"date": str(date), "weekday": date.strftime("%A")}


def find_handyman(trade: str) -> dict:
    """Find a craftsman for repairs in the house, with rates.

    Args:
        trade: Kind of work, such as plumber.
    """
    return {
        "name": f"{trade.title()} Brothers",
        "eur_per_hour": 35 + int(40 * draw("craft", trade)),
        "free": "Thursday",
    }


def league_table(league: str) -> dict:
    """Show which team leads a sports league, and by how many points.

    Args:
        league: Name of the league.
    """
    team = ("United", "Rovers", "City", "Athletic")[int(4 * draw("league", league))]
    return {"leader": team, "points": 60 + int(25 * draw("points", league)), "lead": int(9 * draw("lead", league))}


def match_result(team: str) -> dict:
    """Report the score of a team's latest game.

    Args:
        team: Name of the team.
    """
    scored, conceded = int(5 * draw("goals", team)), int(4 * draw("against", team))
    return {"score": f"{scored}:{conceded}", "won": scored > conceded}


def pick_board_game(players: int, minutes: int = 60) -> dict:
    """Suggest a board game for a number of players and the time there is.

    Args:
        players: Number of players.
        minutes: Time there is, in minutes.
    """
    games = ("chess", "a rail building game", "a word game", "a farming game", "a bluffing game")
    return {"game": games[min(4, players - 1)] if players > 0 else games[0], "fits": minutes >= 30}
