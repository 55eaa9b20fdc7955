"""Mail, contacts, calls and chat, over a small fixed address book."""

from .places import draw


CONTACTS = {
    "Mara": ("mara@example.org", "555-0101", "March 3"),
    "Jonas": ("jonas@example.org", "555-0102", "July 19"),
    "Priya": ("priya@example.org", "555-0103", "June 28"),
    "Tom": ("tom@example.org", "555-0104", "December 1"),
    "Elena": ("elena@example.org", "555-0105", "September 9"),
    "Kenji": ("kenji@example.org", "555-0106", "May 30"),
}
MAILS = {
    "invoice": "Invoice 2209 from the printer",
    "contract": "Signed contract from Elena",
    "trip": "Photos from Tom",
}


def _contact(name: str) -> tuple[str, str, str]:
    try:
        return CONTACTS[name.strip().title()]
    except KeyError:
        raise ValueError(f"no contact called {name!r}; there are {', '.join(CONTACTS)}") from None


def send_mail(recipient: str, subject: str) -> dict:
    """Send an e-mail to somebody.

    Args:
        recipient: Name of the recipient.
        subject: What the mail is about.
    """
    return {"sent_to": _contact(recipient)[0], "subject": subject}


def search_mail(word: str) -> dict:
    """Search the mailbox for messages that contain a word.

    Args:
        word: What to look for.
    """
    found = [mail for key, mail in MAILS.items() if word.lower() in (key + mail).lower()]
    return {"found": len(found), "latest": found[0] if found else "nothing"}


def inbox_summary() -> dict:
    """Summarize the unread messages in the inbox."""
    return {"unread": len(MAILS), "subjects": list(MAILS.values())}


def set_out_of_office(until: str) -> dict:
    """Switch on an automatic reply that says I am away.

    Args:
        until: Last day of the absence.
    """
    return {"auto_reply": "on", "until": until}


def unsubscribe(newsletter: str) -> dict:
    """Stop receiving a newsletter or mailing list.

    Args:
        newsletter: Name of the newsletter.
    """
    return {"unsubscribed": newsletter, "mails_saved_per_month": 2 + int(20 * draw("news", newsletter))}


def mark_as_spam(sender: str) -> dict:
    """Block a sender and move the messages to the junk folder.

    Args:
        sender: Who is to be blocked.
    """
    return {"blocked": sender, "moved": 1 + int(12 * draw("junk", sender))}


def forward_mail(word: str, recipient: str) -> dict:
    """Pass a received message on to somebody else.

    Args:
        word: Word by which the message is found.
        recipient: Name of the recipient.
    """
    return {"forwarded": search_mail(word)["latest"], "to": _contact(recipient)[0]}


def attachment_size(word: str) -> dict:
    """Tell how large the files attached to a message are.

    Args:
        word: Word by which the message is found.
    """
    return {"files": 1 + int(3 * draw("files", word)), "megabytes": round(0.3 + 20 * draw("mb", word), 1)}


def find_phone_number(name: str) -> dict:
    """Look up somebody's phone number in the address book.

    Args:
        name: Name of the person.
    """
    return {"phone": _contact(name)[1]}


def find_mail_address(name: str) -> dict:
    """Look up somebody's e-mail address in the address book.

    Args:
        name: Name of the person.
    """
    return {"mail": _contact(name)[0]}


def find_birthday(name: str) -> dict:
    """Look up when somebody's birthday is.

    Args:
        name: Name of the person.
    """
    return {"birthday": _contact(name)[2]}


def add_contact(name: str, phone: str) -> dict:
    """Save a new person in the address book.

    Args:
        name: Name of the person.
        phone: Phone number.
    """
    return {"saved": name, "phone": phone, "contacts": len(CONTACTS) + 1}


def send_text(recipient: str, text: str) -> dict:
    """Send a short text message to somebody's mobile phone.

    Args:
        recipient: Name of the recipient.
        text: What the message says.
    """
    return {"to": _contact(recipient)[1], "characters": len(text)}


def start_call(name: str) -> dict:
    """Ring somebody up on the phone.

    Args:
        name: Name of the person.
    """
    return {"calling": _contact(name)[1]}


def voicemail() -> dict:
    """Play back and transcribe the messages on the answering machine."""
    return {"messages": 2, "latest": "Kenji: please ring me back about Friday"}


def create_meeting_link(title: str) -> dict:
    """Create a link for a video conference.

    Args:
        title: What the meeting is about.
    """
    return {"link": f"https://meet.example.org/{int(draw('link', title) * 90000) + 10000}"}


def create_poll(question: str) -> dict:
    """Start a vote in the group chat.

    Args:
        question: What people vote on.
    """
    return {"poll": question, "id": int(draw("poll", question) * 900) + 100}


def post_announcement(channel: str, text: str) -> dict:
    """Post a message to everyone in a team channel.

    Args:
        channel: Name of the channel.
        text: What the message says.
    """
    return {"channel": channel, "reached": 8 + int(60 * draw("team", channel)), "characters": len(text)}


def mute_chat(chat: str, hours: int = 8) -> dict:
    """Silence the notifications of a chat for some hours.

    Args:
        chat: Name of the chat.
        hours: For how many hours.
    """
    return {"muted": chat, "hours": hours}


def translate_message(chat: str, language: str) -> dict:
    """Show the newest message of a chat in another language.

    Args:
        chat: Name of the chat.
        language: The language wanted.
    """
    return {"chat": chat, "language": language, "unread": int(9 * draw("chat", chat))}
