"""Music, film, books, language and facts, over small fixed tables."""

import re

from .places import draw


SONGS = {
    "rain": "Umbrella Days by The Low Tides",
    "summer": "Long Light by Ana Reyes",
    "love": "Half of Me by North & Vale",
}
FILMS = {
    "Paper Moons": (2019, "drama", 118),
    "The Last Lighthouse": (2021, "thriller", 104),
    "Kite Season": (2016, "comedy", 96),
}
PHRASES = {
    ("thank you", "spanish"): "gracias",
    ("thank you", "french"): "merci",
    ("thank you", "japanese"): "arigatou",
    ("good morning", "spanish"): "buenos días",
    ("good morning", "german"): "guten Morgen",
    ("where is the station", "french"): "où est la gare",
    ("where is the station", "italian"): "dov'è la stazione",
    ("the bill please", "italian"): "il conto per favore",
    ("cheers", "german"): "prost",
}
WORDS = {
    "serendipity": "a happy discovery by chance",
    "ephemeral": "lasting a very short time",
    "stoic": "calm in hardship",
}
SYNONYMS = {
    "happy": ["glad", "cheerful"],
    "big": ["large", "huge"],
    "fast": ["quick", "swift"],
    "sad": ["gloomy", "unhappy"],
}
ELEMENTS = {
    "gold": ("Au", 79),
    "iron": ("Fe", 26),
    "oxygen": ("O", 8),
    "neon": ("Ne", 10),
    "lead": ("Pb", 82),
    "helium": ("He", 2),
}
COUNTRIES = {"Japan": ("Tokyo", 124), "Kenya": ("Nairobi", 55), "Chile": ("Santiago", 20), "Norway": ("Oslo", 5)}
COUNTRIES |= {
    "Portugal": ("Lisbon", 10),
    "Canada": ("Ottawa", 39),
    "Egypt": ("Cairo", 112),
    "India": ("New Delhi", 1430),
}
PLANETS = {
    "Mercury": (57.9, 0),
    "Venus": (108.2, 0),
    "Mars": (227.9, 2),
    "Jupiter": (778.6, 95),
    "Saturn": (1433.5, 146),
}
HINTS = {
    "spanish": ("el", "la", "de", "que"),
    "german": ("der", "die", "und", "ist"),
    "french": ("le", "les", "et", "est"),
}


def find_song(topic: str) -> dict:
    """Find a song by its theme or a line of its lyrics.

    Args:
        topic: Theme or line.
    """
    return {"song": SONGS.get(topic.lower(), f"{topic.title()} Song by The Low Tides")}


def make_playlist(mood: str, minutes: int = 60) -> dict:
    """Put music together for a mood or an occasion.

    Args:
        mood: Mood or occasion.
        minutes: Length in minutes.
    """
    return {"playlist": f"{mood} mix", "tracks": minutes // 4}


def find_concert(city: str, genre: str = "any") -> dict:
    """Find live music and gigs in a city.

    Args:
        city: Name of the city.
        genre: Kind of music.
    """
    band = ("The Low Tides", "Ana Reyes", "North & Vale")[int(3 * draw("band", city, genre))]
    return {"artist": band, "tickets_eur": 15 + int(60 * draw("gig", city)), "day": "Saturday"}


def movie_details(title: str) -> dict:
    """Give the year, genre and running time of a film.

    Args:
        title: Title of the film.
    """
    year, genre, minutes = FILMS.get(title, (2010, "drama", 90 + int(60 * draw("film", title))))
    return {"year": year, "genre": genre, "minutes": minutes}


def recommend_movie(genre: str) -> dict:
    """Suggest a film to watch tonight.

    Args:
        genre: Kind of film. (choices: ["drama", "thriller", "comedy"])
    """
    return {"movie": next(title for title, film in FILMS.items() if film[1] == genre)}


def cinema_showtimes(title: str, city: str) -> dict:
    """Tell when a film is shown in the cinemas of a city.

    Args:
        title: Title of the film.
        city: Name of the city.
    """
    return {"cinema": f"Rex {city}", "times": ["17:30", f"{19 + int(4 * draw('show', title, city))}:15"]}


def find_book(topic: str) -> dict:
    """Find a book about a subject, with its author.

    Args:
        topic: The subject.
    """
    author = ("I. Okafor", "L. Brandt", "S. Marin")[int(3 * draw("author", topic))]
    return {"book": f"A Short History of {topic.title()}", "author": author, "pages": 160 + int(300 * draw(topic))}


def find_podcast(topic: str) -> dict:
    """Find a podcast episode on a subject.

    Args:
        topic: The subject.
    """
    return {"podcast": f"{topic.title()} Explained", "minutes": 20 + int(50 * draw("pod", topic))}


def tv_guide(channel: str) -> dict:
    """Tell what is on a television channel this evening.

    Args:
        channel: Name of the channel.
    """
    show = ("a nature documentary", "the quiz of the week", "a crime series", "the football night")[
        int(4 * draw("tv", channel))
    ]
    return {"at_20_15": show}


def museum_exhibitions(city: str) -> dict:
    """Tell which exhibitions the museums of a city show.

    Args:
        city: Name of the city.
    """
    show = ("Light and Stone", "Women of the Bauhaus", "Maps of the Sea")[int(3 * draw("museum", city))]
    return {"exhibition": show, "ticket_eur": 6 + int(12 * draw("art", city))}


def translate_phrase(phrase: str, language: str) -> dict:
    """Translate a phrase into another language.

    Args:
        phrase: The phrase in English.
        language: The language wanted.
    """
    try:
        return {"translation": PHRASES[phrase.lower().strip("?!."), language.lower()]}
    except KeyError:
        raise ValueError(f"no translation of {phrase!r} into {language}") from None


def detect_language(text: str) -> dict:
    """Tell in which language a text is written.

    Args:
        text: The text.
    """
    words = re.findall(r"\w+", text.lower())
    hits = {language: sum(word in hints for word in words) for language, hints in HINTS.items()}
    best = max(hits, key=lambda language: hits[language])
    return {"language": best if hits[best] else "english"}


def define_word(word: str) -> dict:
    """Look a word up in the dictionary.

    Args:
        word: The word.
    """
    return {"meaning": WORDS.get(word.lower(), "not in this dictionary")}


def find_synonyms(word: str) -> dict:
    """Find other words of the same meaning.

    Args:
        word: The word.
    """
    return {"synonyms": SYNONYMS.get(word.lower(), [])}


def check_spelling(word: str) -> dict:
    """Check how a word is spelled.

    Args:
        word: The word as it was written.
    """
    right = {"recieve": "receive", "definately": "definitely", "seperate": "separate", "neccessary": "necessary"}
    return {"correct": word.lower() not in right, "spelling": right.get(word.lower(), word)}


def readability_score(text: str) -> dict:
    """Measure how easy a text is to read.

    Args:
        text: The text.
    """
    words = re.findall(r"\w+", text)
    length = sum(map(len, words)) / max(1, len(words))
    return {"words": len(words), "level": "easy" if length < 4.5 else "hard"}


def chemical_element(name: str) -> dict:
    """Give symbol and atomic number of a chemical element.

    Args:
        name: Name of the element.
    """
    try:
        symbol, number = ELEMENTS[name.lower()]
    except KeyError:
        raise ValueError(f"unknown element {name!r}; known: {', '.join(ELEMENTS)}") from None
    return {"symbol": symbol, "atomic_number": number}


def country_facts(country: str) -> dict:
    """Give capital and population of a country.

    Args:
        country: Name of the country.
    """
    try:
        capital, millions = COUNTRIES[country]
    except KeyError:
        raise ValueError(f"unknown country {country!r}; known: {', '.join(COUNTRIES)}") from None
    return {"capital": capital, "population_millions": millions}


def planet_facts(planet: str) -> dict:
    """Give a planet's distance from the sun and its number of moons.

    Args:
        planet: Name of the planet.
    """
    try:
        distance, moons = PLANETS[planet.title()]
    except KeyError:
        raise ValueError(f"unknown planet {planet!r}; known: {', '.join(PLANETS)}") from None
    return {"million_km": distance, "moons": moons}


def animal_facts(animal: str) -> dict:
    """Tell how long an animal lives and how fast it is.

    Args:
        animal: Name of the animal.
    """
    return {"lives_years": 2 + int(60 * draw("age", animal)), "top_speed_kmh": 4 + int(90 * draw("speed", animal))}
