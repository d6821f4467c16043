"""The families of writing tasks that make up the mini world: a table, nothing else.

Template language, used on both sides:

- `{slot}`            the slot's value. In a response a marker slot (see `lexicon.MARKERS`) shows as one of its phrases.
- `[ text {slot}]`    left out, whole, when the task does not set every slot inside. Does not nest.
- `<one|other>`       either wording will do; responses only.
- `a `                becomes `an ` before a vowel ("an owl", "an urgent").

Every trained wording has its own response, so that a reader of the response can tell which wording was asked for.
Wordings under `unseen` are never used in training; any of the family's responses answers them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wording:
    """One way to ask, and the response it asks for."""

    instruction: str
    response: str


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of writing task: its slots (name -> kind of value) and its wordings.

    The first two required slots are the pair that decides whether a task is held out from training.
    """

    name: str
    required: dict[str, str]
    optional: dict[str, str]
    wordings: tuple[Wording, ...]
    unseen: tuple[str, ...]

    @property
    def slots(self) -> dict[str, str]:
        """All slots, required ones first: name -> kind of value."""
        return {**self.required, **self.optional}


_TABLE = (
    Family(
        "reminder",
        required={"name": "person", "chore": "chore"},
        optional={"day": "day", "time": "time", "tone": "tone"},
        wordings=(
            Wording(
                "Write a[ {tone}] reminder for {name} to {chore}[ on {day}][ at {time}].",
                "Hello {name}, this is a reminder to {chore}[ on {day}][ at {time}].[ {tone}]",
            ),
            Wording(
                "Tell {name} not to forget to {chore}[ on {day}][ at {time}].[ Sound {tone}.]",
                "Hey {name}, <please|kindly> do not forget to {chore}[ on {day}][ at {time}].[ {tone}]",
            ),
        ),
        unseen=("Remind {name} to {chore}[ on {day}][ at {time}][ in a {tone} tone].",),
    ),
    Family(
        "invitation",
        required={"name": "person", "event": "event"},
        optional={"place": "place", "day": "day", "dish": "dish"},
        wordings=(
            Wording(
                "Write an invitation for {name} to a {event}[ at the {place}][ on {day}].[ Ask for {dish}.]",
                "Dear {name}, you are invited to a {event}[ at the {place}][ on {day}].[ Please bring {dish}.]",
            ),
            Wording(
                "Send {name} an email about joining the {event}[ near the {place}][ this {day}]"
                "[, with {dish} to share].",
                "Subject: {event}\nHi {name}, <would you like to|can you> join us[ near the {place}][ this {day}]?"
                "[ You could share some {dish}.]",
            ),
        ),
        unseen=("Invite {name} to the {event}[ at the {place}][ on {day}][ and ask for {dish}].",),
    ),
    Family(
        "story",
        required={"animal": "animal", "object": "object"},
        optional={"trait": "trait", "setting": "setting", "ending": "ending"},
        wordings=(
            Wording(
                "Write a short story about a[ {trait}] {animal} who finds a {object}[ in the {setting}]."
                "[ Give it a {ending} ending.]",
                "Once upon a time, a[ {trait}] {animal} <stumbled upon|found> a {object}[ in the {setting}]."
                "[ {ending}]",
            ),
            Wording(
                "Tell a tale where a[ {trait}] {animal} loses a {object}[ near the {setting}][, with a {ending} end].",
                "Long ago, a[ {trait}] {animal} lost a {object}[ near the {setting}].[ {ending}]",
            ),
        ),
        unseen=(
            "Make up a story in which a[ {trait}] {animal} finds a {object}[ in the {setting}][ ({ending} ending)].",
        ),
    ),
    Family(
        "slogan",
        required={"product": "product", "company": "company"},
        optional={"quality": "quality", "city": "city", "style": "style"},
        wordings=(
            Wording(
                "Write a[ {style}] slogan for a[ {quality}] {product} by {company}[ for customers in {city}].",
                "[Hello {city}! ]<Meet|Discover> the[ {quality}] {product} by {company}.[ {style}]",
            ),
            Wording(
                "Create a[ {style}] ad for the {company} {product}[, which is {quality}][ and sold in {city}].",
                "New from {company}: a {product}[ that is {quality}][, now in {city}].[ {style}]",
            ),
        ),
        unseen=("Come up with a[ {style}] slogan for the[ {quality}] {product} from {company}[, sold in {city}].",),
    ),
    Family(
        "postcard",
        required={"name": "person", "city": "city"},
        optional={"weather": "weather", "place": "place", "dish": "dish"},
        wordings=(
            Wording(
                "Write a postcard from {city} to {name}.[ Say it is {weather}.][ Mention the {place}.]"
                "[ Say you tried the {dish}.]",
                "Dear {name}, greetings from {city}![ It is {weather} here.][ I saw the {place}.]"
                "[ I tried the {dish}.] Wish you were here!",
            ),
            Wording(
                "Send {name} a holiday card about {city}[, with {weather} weather][, a visit to the {place}]"
                "[ and eating {dish}].",
                "Hi {name}, I am in {city}.[ The weather is {weather}.][ I visited the {place}.]"
                "[ I ate some {dish}.] See you soon!",
            ),
        ),
        unseen=(
            "Write to {name} from {city} on a postcard[, saying it is {weather}][, mentioning the {place}]"
            "[ and the {dish} you tried].",
        ),
    ),
    Family(
        "thanks",
        required={"name": "person", "gift": "gift"},
        optional={"event": "event", "sender": "sender"},
        wordings=(
            Wording(
                "Write a thank-you note to {name} for the {gift}.[ Mention the {event}.][ Sign it from {sender}.]",
                "Dear {name}, thank you <so|very> much for the {gift}![ It was good to see you at the {event}.]"
                "[ Love, {sender}]",
            ),
            Wording(
                "Thank {name} for bringing a {gift}[ to the {event}][, signed {sender}].",
                "Many thanks to {name} for bringing a {gift}[ to the {event}].[ Yours, {sender}]",
            ),
        ),
        unseen=("Say thank you to {name} for the {gift}[ and mention the {event}][, from {sender}].",),
    ),
    Family(
        "apology",
        required={"name": "person", "mishap": "mishap"},
        optional={"day": "day", "remedy": "remedy", "tone": "tone"},
        wordings=(
            Wording(
                "Apologize to {name} for {mishap}[ on {day}][ and offer to {remedy}].[ Keep it {tone}.]",
                "Dear {name}, I am <so|very> sorry for {mishap}[ on {day}].[ I will {remedy}.][ {tone}]",
            ),
            Wording(
                "Write a[ {tone}] apology to {name} about {mishap}[ last {day}].[ Promise to {remedy}.]",
                "Hello {name}, please forgive me for {mishap}[ last {day}].[ I promise to {remedy}.][ {tone}]",
            ),
        ),
        unseen=("Say sorry to {name} for {mishap}[ on {day}][, promise to {remedy}][ and sound {tone}].",),
    ),
    Family(
        "bio",
        required={"name": "person", "job": "job"},
        optional={"city": "city", "hobby": "hobby", "animal": "animal"},
        wordings=(
            Wording(
                "Write a short bio of {name}, a {job}[ from {city}][ who loves {hobby}].[ Mention a pet {animal}.]",
                "<This is|Say hello to> {name}, a {job}[ from {city}][ who loves {hobby}]."
                "[ At home waits a pet {animal}.]",
            ),
            Wording(
                "Introduce {name}: job {job}[, home {city}][, hobby {hobby}][, pet {animal}].",
                "Meet {name}, who works as a {job}[, lives in {city}][, enjoys {hobby}][, owns a {animal}].",
            ),
        ),
        unseen=("Describe {name}, a {job}[ living in {city}][ who enjoys {hobby}][ and owns a {animal}].",),
    ),
    Family(
        "poem",
        required={"setting": "setting", "object": "object"},
        optional={"weather": "weather", "animal": "animal", "style": "style"},
        wordings=(
            Wording(
                "Write a[ {style}] poem about a[ {weather}] {setting} using the word {object}[, with a {animal}].",
                "In the[ {weather}] {setting} so <wide|still>,\na {object} lay by my side"
                "[,\nand a {animal} was my guide].[\n{style}]",
            ),
            Wording(
                "Compose a[ {style}] verse on a {object} from a[ {weather}] {setting}[ and a {animal}].",
                "My {object} came from far away,\nfrom a[ {weather}] {setting} cold and gray"
                "[,\nwhere a {animal} loved to play].[\n{style}]",
            ),
        ),
        unseen=("Write a[ {style}] rhyme with a {object} in a[ {weather}] {setting}[ and a {animal}].",),
    ),
    Family(
        "headline",
        required={"job": "job", "object": "object"},
        optional={"city": "city", "day": "day", "trait": "trait"},
        wordings=(
            Wording(
                "Write a headline about a[ {trait}] {job} who found a {object}[ in {city}][ on {day}].",
                "BREAKING:[ {trait}] {job} <finds|discovers> {object}[ in {city}][ on {day}]!",
            ),
            Wording(
                "Report the news that a[ {trait}] {job} sold a {object}[ to {city}][ last {day}].",
                "NEWS: a[ {trait}] {job} sold a {object}[ to {city}][ last {day}].",
            ),
        ),
        unseen=("Give me a newspaper headline: a[ {trait}] {job} found a {object}[ in {city}][ on {day}].",),
    ),
    Family(
        "contact card",
        required={"name": "person", "company": "company"},
        optional={"job": "job", "city": "city", "day": "day"},
        wordings=(
            Wording(
                "Make a contact card for {name} of {company}[, a {job}][ in {city}].[ Say to call on {day}.]",
                "Name: {name}\nCompany: {company}[\nJob: {job}][\nCity: {city}][\nCall: {day}]",
            ),
            Wording(
                "Write the email signature of {name} at {company}[, working as a {job}][, based in {city}]"
                "[, not in on {day}].",
                "Sent by {name}, {company}[\nRole: {job}][\nOffice: {city}][\nAway: {day}]",
            ),
        ),
        unseen=("Put {name} from {company} on a contact card[ as a {job}][ in {city}][, to call on {day}].",),
    ),
    Family(
        "review",
        required={"product": "product", "company": "company", "rating": "rating"},
        optional={"quality": "quality", "flaw": "flaw"},
        wordings=(
            Wording(
                "Write a {rating} star review of a {product} by {company}.[ Praise that it is {quality}.]"
                "[ Complain that it {flaw}.]",
                "My new {product} by {company} gets {rating} stars.[ It is very {quality}.][ But it {flaw}.]",
            ),
            Wording(
                "Rate the {company} {product} with {rating} out of ten[, being {quality}][, though it {flaw}].",
                "I give the {company} {product} {rating} out of ten.[ I like how {quality} it is.][ Sadly it {flaw}.]",
            ),
        ),
        unseen=("Give the {company} {product} a review of {rating} stars[, as it is {quality}][ but it {flaw}].",),
    ),
    Family(
        "packing list",
        required={"city": "city", "first": "gear", "second": "gear"},
        optional={"third": "gear", "weather": "weather"},
        wordings=(
            Wording(
                "Write a packing list for a[ {weather}] trip to {city} with {first} and {second}[, plus {third}].",
                "Packing list for[ {weather}] {city}:\n- {first}\n- {second}[\n- {third}]",
            ),
            Wording(
                "Tell me to bring {first} and {second}[, and also {third},] to {city}[, where it is {weather}].",
                "For {city}[, where it is {weather},] you must bring {first} and {second}[, and also {third}].",
            ),
        ),
        unseen=("List what to pack for[ {weather}] {city}: {first} and {second}[ and {third}].",),
    ),
    Family(
        "lost pet notice",
        required={"animal": "animal", "place": "place"},
        optional={"trait": "trait", "name": "person", "day": "day"},
        wordings=(
            Wording(
                "Write a notice about a lost[ {trait}] {animal}, last seen at the {place}[ on {day}]."
                "[ Say to call {name}.]",
                "LOST:[ {trait}] {animal}, last seen at the {place}[ on {day}].[ Please call {name}.]",
            ),
            Wording(
                "Make a poster saying that a[ {trait}] {animal} ran away from the {place}[ this {day}]"
                "[ and belongs to {name}].",
                "Have you seen a[ {trait}] {animal}? It ran away from the {place}[ this {day}]."
                "[ It belongs to {name}.]",
            ),
        ),
        unseen=(
            "Ask people to look for a lost[ {trait}] {animal} near the {place}[ since {day}][, and to call {name}].",
        ),
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}
"""Every family by name, in the order in which samples go through them."""
