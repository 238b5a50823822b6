"""What the shipped model is to know: facts, small dictionaries, emoji, small talk, and what nobody can tell it.

Everything here is common knowledge, written down for this project. A table row is ``key=value``, rows are separated by
commas.
"""


def words(text: str) -> list[str]:
    """Split at white space."""
    return text.split()


def table(text: str) -> dict[str, str]:
    """Parse ``key=value, key=value``."""
    pairs = {}
    for row in text.split(","):
        key, value = row.split("=")
        pairs[" ".join(key.split())] = " ".join(value.split())
    return pairs


CAPITALS = table(
    """France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Portugal=Lisbon, Austria=Vienna, Switzerland=Bern,
    Belgium=Brussels, Poland=Warsaw, Greece=Athens, Turkey=Ankara, Russia=Moscow, Ukraine=Kyiv, Norway=Oslo,
    Sweden=Stockholm, Finland=Helsinki, Denmark=Copenhagen, Iceland=Reykjavík, Ireland=Dublin, England=London,
    Scotland=Edinburgh, Wales=Cardiff, Hungary=Budapest, Romania=Bucharest, Bulgaria=Sofia, Croatia=Zagreb,
    Serbia=Belgrade, Estonia=Tallinn, Latvia=Riga, Lithuania=Vilnius, Egypt=Cairo, Morocco=Rabat, Kenya=Nairobi,
    Ghana=Accra, Senegal=Dakar, Ethiopia=Addis Ababa, Tunisia=Tunis, Uganda=Kampala, Japan=Tokyo, China=Beijing,
    India=New Delhi, Nepal=Kathmandu, Thailand=Bangkok, Vietnam=Hanoi, Indonesia=Jakarta, Mongolia=Ulaanbaatar,
    Iran=Tehran, Iraq=Baghdad, Canada=Ottawa, Mexico=Mexico City, Cuba=Havana, Peru=Lima, Chile=Santiago,
    Brazil=Brasília, Argentina=Buenos Aires, Colombia=Bogotá, Ecuador=Quito, Uruguay=Montevideo, Paraguay=Asunción,
    Australia=Canberra, New Zealand=Wellington, Fiji=Suva"""
)

OPPOSITES = table(
    """hot=cold, big=small, tall=short, fast=slow, old=young, new=old, happy=sad, light=dark, day=night, up=down,
    left=right, in=out, open=closed, full=empty, wet=dry, hard=soft, heavy=light, early=late, first=last, good=bad,
    rich=poor, strong=weak, loud=quiet, clean=dirty, long=short, high=low, near=far, true=false, yes=no, win=lose,
    push=pull, buy=sell, begin=end, love=hate, laugh=cry, summer=winter, north=south, east=west, black=white,
    thick=thin, wide=narrow, easy=difficult, sweet=bitter, sharp=blunt, brave=afraid, always=never"""
)

COLOURS = table(
    """grass=green, snow=white, coal=black, blood=red, a banana=yellow, a carrot=orange, the sky=blue, a lemon=yellow,
    chocolate=brown, milk=white, a tomato=red, a frog=green, a flamingo=pink, a raven=black, a strawberry=red,
    honey=gold, an elephant=grey, a plum=purple, a pumpkin=orange, the sea=blue, a cucumber=green, a cherry=red, a
    swan=white, mustard=yellow, silver=grey, a leaf=green, a lime=green, soot=black, a ruby=red, an emerald=green"""
)

YOUNG = table(
    """dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb, goat=kid, pig=piglet, hen=chick, duck=duckling,
    goose=gosling, swan=cygnet, bear=cub, lion=cub, fox=cub, deer=fawn, frog=tadpole, kangaroo=joey, owl=owlet,
    eagle=eaglet, seal=pup, elephant=calf, whale=calf, rabbit=kit, butterfly=caterpillar"""
)

SOUNDS = table(
    """dog=woof, cat=meow, cow=moo, sheep=baa, duck=quack, hen=cluck, pig=oink, lion=roar, snake=hiss, bee=buzz,
    horse=neigh, frog=croak, owl=hoot, wolf=howl, mouse=squeak, crow=caw, donkey=hee-haw, goose=honk, pigeon=coo,
    rooster=cock-a-doodle-doo"""
)

LEGS = table(
    """a dog=four, a cat=four, a hen=two, a spider=eight, a bee=six, an ant=six, a snake=no, a horse=four, a fish=no, a
    duck=two, a cow=four, a beetle=six, a crab=ten, a worm=no, a person=two, a frog=four, a butterfly=six, an
    owl=two, a fly=six, a fox=four"""
)

SYMBOLS = table(
    """hydrogen=H, helium=He, lithium=Li, carbon=C, nitrogen=N, oxygen=O, fluorine=F, neon=Ne, sodium=Na, magnesium=Mg,
    aluminium=Al, silicon=Si, phosphorus=P, sulfur=S, chlorine=Cl, argon=Ar, potassium=K, calcium=Ca, iron=Fe,
    copper=Cu, zinc=Zn, silver=Ag, tin=Sn, gold=Au, mercury=Hg, lead=Pb, uranium=U, nickel=Ni, iodine=I,
        platinum=Pt"""
)

PAST = table(
    """go=went, see=saw, eat=ate, come=came, give=gave, take=took, make=made, run=ran, sing=sang, swim=swam,
    write=wrote, drive=drove, speak=spoke, break=broke, think=thought, bring=brought, buy=bought, catch=caught,
    teach=taught, find=found, fly=flew, grow=grew, know=knew, draw=drew, throw=threw, sleep=slept, keep=kept,
    feel=felt, leave=left, meet=met, sit=sat, stand=stood, tell=told, win=won, begin=began, drink=drank, fall=fell,
    forget=forgot, hear=heard, hold=held"""
)

PLURALS = table(
    """mouse=mice, goose=geese, foot=feet, tooth=teeth, child=children, man=men, woman=women, person=people, ox=oxen,
    leaf=leaves, wolf=wolves, knife=knives, life=lives, wife=wives, sheep=sheep, fish=fish, cat=cats, city=cities,
    box=boxes, baby=babies"""
)

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
PLANETS = words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")
SIDES = table(
    """triangle=three, square=four, rectangle=four, pentagon=five, hexagon=six, heptagon=seven, octagon=eight,
    nonagon=nine, decagon=ten, circle=no"""
)


def after(names: list[str]) -> dict[str, str]:
    """Each name and the next one, in a ring."""
    return dict(zip(names, names[1:] + names[:1], strict=True))


def before(names: list[str]) -> dict[str, str]:
    """Each name and the one ahead of it, in a ring."""
    return {b: a for a, b in after(names).items()}


# topic -> (table, answer, phrasings); {k} is the key, {K} the same at the start of a sentence, {v} the value
FACTS = {
    "capital": (CAPITALS, "The capital of {k} is {v}.", [
        "What is the capital of {k}?", "Which city is the capital of {k}?", "Name the capital of {k}.",
        "Tell me the capital of {k}.", "What's the capital city of {k}?", "{k} has which capital?",
        "Do you know the capital of {k}?", "capital of {k}", "Please name {k}'s capital."]),
    "country": ({v: k for k, v in CAPITALS.items()}, "{k} is the capital of {v}.", [
        "{k} is the capital of which country?", "Which country has the capital {k}?",
        "What country is {k} the capital of?", "Of which country is {k} the capital?",
        "Name the country whose capital is {k}.", "Whose capital is {k}?"]),
    "opposite": (OPPOSITES, "The opposite of {k} is {v}.", [
        "What is the opposite of {k}?", "Tell me the opposite of {k}.", "Which word means the opposite of {k}?",
        "opposite of {k}", "Name the opposite of {k}.", "What's the contrary of {k}?",
        "Give me the opposite of {k}."]),
    "colour": (COLOURS, "{K} is {v}.", [
        "What colour is {k}?", "Which colour is {k}?", "Tell me the colour of {k}.", "What is the colour of {k}?",
        "What color is {k}?", "Name the colour of {k}.", "Do you know what colour {k} is?"]),
    "young": (YOUNG, "A young {k} is called a {v}.", [
        "What is a young {k} called?", "What do you call a baby {k}?", "Name the young of a {k}.",
        "What is a baby {k} called?", "How is a young {k} called?", "Tell me the word for a young {k}."]),
    "sound": (SOUNDS, "A {k} says {v}.", [
        "What does a {k} say?", "What sound does a {k} make?", "Which noise does a {k} make?",
        "How does a {k} sound?", "Tell me the sound of a {k}.", "What noise does the {k} make?"]),
    "legs": (LEGS, "{K} has {v} legs.", [
        "How many legs does {k} have?", "How many legs has {k}?", "Tell me how many legs {k} has.",
        "Count the legs of {k}.", "What number of legs does {k} have?", "On how many legs does {k} walk?"]),
    "symbol": (SYMBOLS, "The chemical symbol of {k} is {v}.", [
        "What is the chemical symbol of {k}?", "Which symbol stands for {k}?", "Tell me the symbol of {k}.",
        "How do chemists write {k}?", "What's the symbol for {k}?", "Name the chemical symbol for {k}."]),
    "past": (PAST, "The past tense of {k} is {v}.", [
        "What is the past tense of {k}?", "Tell me the past tense of {k}.", "Put {k} into the past tense.",
        "past tense of {k}", "What is the simple past of {k}?", "Name the past tense of {k}."]),
    "plural": (PLURALS, "The plural of {k} is {v}.", [
        "What is the plural of {k}?", "Tell me the plural of {k}.", "One {k}, two what?", "plural of {k}",
        "Name the plural of {k}.", "How do you write more than one {k}?"]),
    "sides": (SIDES, "A {k} has {v} sides.", [
        "How many sides does a {k} have?", "How many sides has a {k}?", "Count the sides of a {k}.",
        "Tell me how many sides a {k} has.", "What number of sides does a {k} have?"]),
    "day after": (after(DAYS), "The day after {k} is {v}.", [
        "Which day comes after {k}?", "What day follows {k}?", "What is the day after {k}?",
        "Today is {k}. What is tomorrow?", "Name the day after {k}."]),
    "day before": (before(DAYS), "The day before {k} is {v}.", [
        "Which day comes before {k}?", "What is the day before {k}?", "Today is {k}. What was yesterday?",
        "Name the day before {k}."]),
    "month after": (after(MONTHS), "The month after {k} is {v}.", [
        "Which month comes after {k}?", "What month follows {k}?", "What is the month after {k}?",
        "Name the month after {k}."]),
    "month before": (before(MONTHS), "The month before {k} is {v}.", [
        "Which month comes before {k}?", "What is the month before {k}?", "Name the month before {k}."]),
    "planet": (dict(zip(PLANETS, words("first second third fourth fifth sixth seventh eighth"), strict=True)),
        "{k} is the {v} planet from the sun.", [
        "Which planet from the sun is {k}?", "Counted from the sun, which planet is {k}?",
        "What is the place of {k} among the planets?", "Where does {k} stand, counted from the sun?"]),
}  # fmt: skip

GERMAN = table(
    """dog=Hund, cat=Katze, bird=Vogel, fish=Fisch, horse=Pferd, cow=Kuh, bear=Bär, fox=Fuchs, house=Haus, door=Tür,
    window=Fenster, street=Straße, tree=Baum, flower=Blume, garden=Garten, water=Wasser, bread=Brot, milk=Milch,
    cheese=Käse, apple=Apfel, sun=Sonne, moon=Mond, star=Stern, green=grün, red=rot, blue=blau, five=fünf,
    twelve=zwölf, big=groß, small=klein, beautiful=schön, foot=Fuß, girl=Mädchen, boy=Junge, king=König,
    spoon=Löffel, book=Buch, school=Schule, friend=Freund, thank you=danke, good morning=guten Morgen, good
    night=gute Nacht, goodbye=auf Wiedersehen, yes=ja, no=nein"""
)
FRENCH = table(
    """dog=chien, cat=chat, bird=oiseau, fish=poisson, horse=cheval, cow=vache, bear=ours, fox=renard, house=maison,
    door=porte, window=fenêtre, street=rue, tree=arbre, flower=fleur, garden=jardin, water=eau, bread=pain,
    milk=lait, cheese=fromage, apple=pomme, sun=soleil, moon=lune, star=étoile, green=vert, red=rouge, blue=bleu,
    five=cinq, twelve=douze, big=grand, small=petit, beautiful=beau, foot=pied, girl=fille, boy=garçon, king=roi,
    spoon=cuillère, book=livre, school=école, friend=ami, thank you=merci, good morning=bonjour, good night=bonne
    nuit, goodbye=au revoir, yes=oui, no=non"""
)
SPANISH = table(
    """dog=perro, cat=gato, bird=pájaro, fish=pez, horse=caballo, cow=vaca, bear=oso, fox=zorro, house=casa,
    door=puerta, window=ventana, street=calle, tree=árbol, flower=flor, garden=jardín, water=agua, bread=pan,
    milk=leche, cheese=queso, apple=manzana, sun=sol, moon=luna, star=estrella, green=verde, red=rojo, blue=azul,
    five=cinco, twelve=doce, big=grande, small=pequeño, beautiful=hermoso, foot=pie, girl=niña, boy=niño, king=rey,
    spoon=cuchara, book=libro, school=escuela, friend=amigo, thank you=gracias, good morning=buenos días, good
    night=buenas noches, goodbye=adiós, yes=sí, no=no"""
)
DICTIONARIES = {"German": GERMAN, "French": FRENCH, "Spanish": SPANISH}
TRANSLATE = [
    "How do you say {k} in {lang}?", "What is {k} in {lang}?", "Translate {k} into {lang}.",
    "What is the {lang} word for {k}?", "Say {k} in {lang}.", "{k} in {lang}?", "Tell me the {lang} for {k}.",
    "How do they say {k} in {lang}?",
]  # fmt: skip

EMOJI = table(
    """cat=🐱, dog=🐶, fox=🦊, bear=🐻, frog=🐸, lion=🦁, cow=🐮, pig=🐷, mouse=🐭, rabbit=🐰, owl=🦉, fish=🐟,
    bee=🐝, snake=🐍, horse=🐴, apple=🍎, banana=🍌, lemon=🍋, cherry=🍒, carrot=🥕, bread=🍞, cheese=🧀,
    cake=🍰, pizza=🍕, egg=🥚, sun=🌞, moon=🌙, star=⭐, rain=🌧, snow=❄, fire=🔥, tree=🌳, flower=🌸,
    rose=🌹, heart=❤, house=🏠, car=🚗, train=🚂, ship=🚢, plane=✈, rocket=🚀, book=📖, key=🔑, clock=⏰,
    bell=🔔, ball=⚽, gift=🎁, drum=🥁, smile=😊, tear=😢"""
)
SHOW_EMOJI = [
    "Show me a {k} emoji.", "What is the emoji for {k}?", "Emoji for {k}?", "Send me the {k} emoji.",
    "Give me an emoji of a {k}.", "Which emoji means {k}?", "Do you have a {k} emoji?",
]  # fmt: skip
NAME_EMOJI = ["What does {v} mean?", "What is {v}?", "Which thing is {v}?", "Name this: {v}"]

# Fixed exchanges: several ways to say it, one answer.
SMALL_TALK = [
    (["Hello!", "Hi!", "Hi", "Hello", "Hey!", "Hello there.", "Good day!"], "Hello! How can I help you?"),
    (["Good morning!", "Good morning.", "Morning!"], "Good morning! How can I help you?"),
    (["Who are you?", "What are you?", "Tell me who you are.", "What is your name?", "Introduce yourself."],
     "I am Tiny, a very small language model."),
    (["How are you?", "How are you today?", "How do you do?", "Are you well?"], "I am fine, thank you. 😊"),
    (["What can you do?", "How can you help me?", "What are you good at?", "Help!"],
     "I can add, subtract, spell, remember, translate a little, call tools and tell stories."),
    (["Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much."], "You are welcome!"),
    (["Goodbye!", "Bye!", "See you.", "Good night!"], "Goodbye! 👋"),
    (["Are you a person?", "Are you human?", "Are you alive?"], "No, I am a very small language model."),
    (["Guten Tag!", "Hallo!", "Guten Morgen!"], "Hallo! Schön, dich zu sehen."),
    (["Wie geht es dir?", "Wie geht's?"], "Mir geht es gut, danke schön!"),
    (["Wer bist du?", "Wie heißt du?", "Was bist du?"], "Ich heiße Tiny und bin ein sehr kleines Sprachmodell."),
    (["Danke!", "Danke schön!", "Vielen Dank!"], "Gern geschehen!"),
    (["Bonjour !", "Salut !", "Bonjour"], "Bonjour ! Ça me fait plaisir de te voir."),
    (["Comment ça va ?", "Ça va ?"], "Ça va très bien, merci !"),
    (["Qui es-tu ?", "Comment t'appelles-tu ?"], "Je m'appelle Tiny, un très petit modèle de langage."),
    (["Merci !", "Merci beaucoup !"], "Je t'en prie !"),
    (["¡Hola!", "Hola", "¡Buenos días!"], "¡Hola! ¿Cómo estás?"),
    (["¿Cómo estás?", "¿Qué tal?"], "Estoy muy bien, ¡gracias!"),
    (["¿Quién eres?", "¿Cómo te llamas?"], "Me llamo Tiny y soy un modelo de lenguaje muy pequeño."),
    (["¡Gracias!", "¡Muchas gracias!"], "¡De nada!"),
]  # fmt: skip

UNKNOWN = [
    "Who won the game yesterday?", "What will the weather be tomorrow?", "What is the meaning of life?",
    "Who is the president?", "How much does a house cost?", "What time is it?", "Where are my keys?",
    "What did I eat today?", "Who wrote this book?", "How old is the universe?", "What is the price of gold?",
    "Why is the sky blue?", "When was my mother born?", "What am I thinking about?", "Who lives next door?",
    "How far is the moon?", "What is the square root of two?", "Which horse will win the race?",
    "What is in my pocket?", "Who is at the door?", "How many stars are there?", "What is the best film?",
    "When does the train leave?", "Where did I park my car?", "How tall is my sister?", "What is the news today?",
    "Who invented the wheel?", "Can you explain quantum physics?", "What is my password?",
    "Who is the richest person?", "How do I fix my bike?", "What should I buy?", "Where is the nearest shop?",
    "What happened last night?", "Who painted this picture?", "How long is this river?", "What does this word mean?",
    "Write me a computer program.", "Explain the law to me.", "Which team is the best?",
]  # fmt: skip
