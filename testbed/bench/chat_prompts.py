"""Prompts for benchmarks of decoding: half are plain questions, half contain a text or code to work on.

The plain questions are the built-in prompts of experiments; their answers share little text with the prompt. The others
are typical of chats: material to correct, change, shorten, sort or search. All are run in this order; none was left out
or reworded after measurements.
"""

from testbed.prompts import PROMPTS

_REPORT = """\
The river rose by forty centimetres between Monday evening and Wednesday morning. Two bridges in the old town were
closed to cars, and the fire brigade filled eight hundred sandbags. By Thursday the water had fallen again. Nobody was
hurt. The town council will meet next week to discuss a flood wall, which would cost about three million euros."""

_MINUTES = """\
Present: Amira, Ben, Chen, Dora. Amira said that the new sensors arrive on 4 May. Ben will test them in the greenhouse
until 11 May and write a short report. Chen asked whether the budget covers a second gateway; Dora will ask the finance
office by Friday. The next meeting is on 18 May at 10:00 in room 2.14."""

_CODE = """\
def average(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)"""

_CLASS = """\
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()

    def peek(self):
        return self.items[-1]"""

_MANUAL = """\
To descale the kettle, fill it with half a litre of water and 50 ml of vinegar. Bring it to the boil once, switch it
off and wait for twenty minutes. Pour the liquid away and rinse the kettle twice with clean water. Never use soap. Do
this once a month, or every two weeks where the water is hard."""

_CSV = """\
name,city,age
Lena,Oslo,34
Marco,Turin,28
Aiko,Osaka,41
Paul,Lyon,25"""

_EMAIL = """\
hi team, i wanted to let you now that the server will be down on saturday from 8 to 12 because we instal new disks.
please save you work before. if you have any question dont hesitate to contact me. thanks, robert"""

_WITH_MATERIAL = (
    f"Summarise this report in two sentences:\n\n{_REPORT}",
    f"How much would the flood wall cost, and who will discuss it? Answer from this text:\n\n{_REPORT}",
    f"Rewrite this text for children:\n\n{_REPORT}",
    f"List the tasks in these minutes, one per line, with who does them and by when:\n\n{_MINUTES}",
    f"When and where is the next meeting?\n\n{_MINUTES}",
    f"Write a short email that sends these minutes to the team:\n\n{_MINUTES}",
    f"Add a docstring to this function and return 0 for an empty list. Show the whole function:\n\n{_CODE}",
    f"Rename the function to mean and use the built-in sum. Show the whole function:\n\n{_CODE}",
    f"Explain this function line by line:\n\n{_CODE}",
    f"Write three unit tests for this function:\n\n{_CODE}",
    f"Add a method is_empty to this class. Show the whole class:\n\n{_CLASS}",
    f"Add type hints to this class. Show the whole class:\n\n{_CLASS}",
    f"Translate this class to JavaScript:\n\n{_CLASS}",
    f"Turn these instructions into a numbered list:\n\n{_MANUAL}",
    f"How often should I do this, and what must I never use?\n\n{_MANUAL}",
    f"Shorten these instructions to one sentence:\n\n{_MANUAL}",
    f"Convert this table to JSON:\n\n{_CSV}",
    f"Sort this table by age and print it again as CSV:\n\n{_CSV}",
    f"Who is the oldest person in this table, and where does she live?\n\n{_CSV}",
    f"Write an SQL statement that inserts these rows into a table called people:\n\n{_CSV}",
    f"Correct the spelling and grammar of this email and print it in full:\n\n{_EMAIL}",
    f"Make this email more formal:\n\n{_EMAIL}",
    f"What should the team do before Saturday?\n\n{_EMAIL}",
    f"Write a polite reply to this email that asks for another day:\n\n{_EMAIL}",
)

_MORE = (
    "What should I pack for a weekend in the mountains?",
    f"Write the method size of this class. Show the whole class:\n\n{_CLASS}",
    "Explain to a beginner what a router does.",
    f"Print this table again with the cities in capital letters:\n\n{_CSV}",
)
CHAT_PROMPTS: tuple[str, ...] = (*(p for pair in zip(PROMPTS, _WITH_MATERIAL, strict=True) for p in pair), *_MORE)
"""Both kinds alternate, so every prefix contains equally many of each."""
