"""Body, food and sport, from common formulas and small tables."""

from .places import TODAY, draw


FOODS = {
    "apple": 52,
    "banana": 89,
    "rice": 130,
    "bread": 265,
    "cheese": 402,
    "salmon": 208,
    "yoghurt": 61,
    "lentils": 116,
}
SPORTS = {"running": 9.8, "walking": 3.5, "cycling": 7.5, "swimming": 8.0, "yoga": 2.5, "rowing": 7.0, "dancing": 5.5}
SUBSTITUTES = {"egg": "a mashed banana", "butter": "olive oil", "milk": "oat drink", "cream": "coconut milk"}
SUBSTITUTES |= {"sugar": "honey", "flour": "ground almonds"}


def body_mass_index(weight: float, height: float) -> dict:
    """Compute the body mass index from weight and height and say which range it lies in.

    Args:
        weight: Weight in kilograms.
        height: Height in centimetres.
    """
    index = weight / (height / 100) ** 2
    return {"bmi": round(index, 1), "range": "low" if index < 18.5 else "normal" if index < 25 else "high"}


def calorie_need(weight: float, height: float, age: int) -> dict:
    """Estimate how many calories a body needs in a day.

    Args:
        weight: Weight in kilograms.
        height: Height in centimetres.
        age: Age in years.
    """
    return {"kcal_per_day": round(1.5 * (10 * weight + 6.25 * height - 5 * age - 78))}


def calories_burned(sport: str, minutes: int) -> dict:
    """Estimate the energy that exercise uses up.

    Args:
        sport: Kind of exercise. (choices: ["running", "walking", "cycling", "swimming", "yoga", "rowing", "dancing"])
        minutes: Length in minutes.
    """
    return {"kcal": round(SPORTS[sport] * 70 * minutes / 60)}


def heart_rate_zone(age: int) -> dict:
    """Compute the maximum pulse and the aerobic training zone for an age.

    Args:
        age: Age in years.
    """
    top = 220 - age
    return {"max_bpm": top, "from_bpm": round(0.6 * top), "to_bpm": round(0.8 * top)}


def sleep_cycles(wake_up: str) -> dict:
    """Tell when to go to bed so that five whole sleep cycles end at the time of getting up.

    Args:
        wake_up: Time of getting up, as HH:MM.
    """
    hours, _, minutes = wake_up.partition(":")
    start = (int(hours) * 60 + int(minutes or 0) - 5 * 90 - 15) % 1440
    return {"bedtime": f"{start // 60:02d}:{start % 60:02d}", "sleep_hours": 7.5}


def water_intake(weight: float) -> dict:
    """Tell how much somebody should drink in a day.

    Args:
        weight: Weight in kilograms.
    """
    return {"litres": round(weight * 0.033, 1), "glasses": round(weight * 0.033 / 0.25)}


def drug_interaction(first: str, second: str) -> dict:
    """Check whether two medicines may be taken together.

    Args:
        first: One medicine.
        second: The other medicine.
    """
    risk = ("none known", "take two hours apart", "ask a doctor")[
        int(3 * draw("drug", *sorted([first.lower(), second.lower()])))
    ]
    return {"advice": risk}


def find_pharmacy(place: str) -> dict:
    """Find a chemist's that is open now near a place.

    Args:
        place: District or street.
    """
    return {"pharmacy": f"{place} Pharmacy", "open_until": f"{19 + int(5 * draw('open', place))}:00"}


def find_doctor(specialty: str, place: str) -> dict:
    """Find a medical practice of a specialty with the next free appointment.

    Args:
        specialty: Field of medicine, such as dermatology.
        place: District or town.
    """
    return {"practice": f"{specialty.title()} {place}", "free_in_days": 1 + int(20 * draw("doc", specialty, place))}


def vaccination_advice(country: str) -> dict:
    """Tell which vaccinations are recommended for a journey to a country.

    Args:
        country: Country to be visited.
    """
    shots = ("hepatitis A", "typhoid", "yellow fever", "rabies", "tetanus")
    first = int(5 * draw("shot", country))
    return {"recommended": [shots[first], shots[(first + 2) % 5]]}


def symptom_check(symptom: str) -> dict:
    """Judge how urgent a symptom is and what to do about it.

    Args:
        symptom: What hurts or is wrong.
    """
    advice = ("rest and drink plenty", "see a doctor this week", "go to the emergency room")
    return {"advice": advice[int(3 * draw("symptom", symptom))]}


def workout_plan(goal: str, days: int = 3) -> dict:
    """Make a training plan for the gym or at home.

    Args:
        goal: Aim of the training. (choices: ["strength", "endurance", "flexibility"])
        days: Training days a week.
    """
    drills = {"strength": "squats and push-ups", "endurance": "intervals and a long run", "flexibility": "stretching"}
    return {"exercises": drills[goal], "minutes_a_week": 45 * days}


def running_pace(distance: float, minutes: float) -> dict:
    """Compute pace and speed of a run.

    Args:
        distance: Distance in kilometres.
        minutes: Time in minutes.
    """
    if distance <= 0:
        raise ValueError("the distance must be above zero")
    seconds = round(60 * minutes / distance)
    return {"pace_per_km": f"{seconds // 60}:{seconds % 60:02d}", "speed_kmh": round(60 * distance / minutes, 1)}


def search_recipes(ingredient: str) -> dict:
    """Find a dish that can be cooked with an ingredient.

    Args:
        ingredient: What is to be used.
    """
    dish = ("soup", "curry", "salad", "gratin", "stew")[int(5 * draw("dish", ingredient))]
    return {"recipe": f"{ingredient} {dish}", "minutes": 15 + 5 * int(9 * draw("cook", ingredient))}


def nutrition_facts(food: str, grams: float = 100) -> dict:
    """Give the calories and protein of an amount of food.

    Args:
        food: Name of the food.
        grams: Amount in grams.
    """
    per_100 = FOODS.get(food.lower(), 50 + int(300 * draw("kcal", food)))
    return {"kcal": round(per_100 * grams / 100), "protein_g": round(grams / 100 * 15 * draw("protein", food), 1)}


def substitute_ingredient(ingredient: str) -> dict:
    """Suggest what to use in cooking or baking in place of something that is missing.

    Args:
        ingredient: What is missing.
    """
    return {"use": SUBSTITUTES.get(ingredient.lower(), "leave it out")}


def scale_recipe(servings: int, wanted: int) -> dict:
    """Tell by how much to multiply the amounts of a recipe for another number of guests.

    Args:
        servings: Portions that the recipe makes.
        wanted: Portions wanted.
    """
    return {"factor": round(wanted / servings, 2)}


def wine_pairing(dish: str) -> dict:
    """Recommend a wine that goes with a dish.

    Args:
        dish: The dish.
    """
    wine = ("Riesling", "Pinot Noir", "Chardonnay", "Rioja", "Prosecco")[int(5 * draw("wine", dish))]
    return {"wine": wine, "serve_at_c": 8 if wine in ("Riesling", "Prosecco") else 15}


def find_restaurant(city: str, cuisine: str) -> dict:
    """Find a place to eat of a cuisine, with its rating and price level.

    Args:
        city: Name of the city.
        cuisine: Kind of cooking, such as Thai.
    """
    return {
        "restaurant": f"{cuisine} Corner {city}",
        "rating": round(3 + 2 * draw(city, cuisine), 1),
        "open": draw(city) > 0.1,
    }


def allergen_check(product: str, allergen: str) -> dict:
    """Tell whether a food contains something that one is allergic to.

    Args:
        product: The food.
        allergen: The allergen. (choices: ["gluten", "nuts", "lactose", "egg"])
    """
    return {"contains": draw("allergen", product, allergen) > 0.5, "checked": str(TODAY)}
