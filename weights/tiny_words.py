"""Names, animals, things, places: what stories and questions are about, and the words to spell."""

from tiny_facts import CAPITALS, DAYS, GERMAN, MONTHS, OPPOSITES, PAST, PLANETS, PLURALS, SIDES, SYMBOLS, YOUNG, words

NAMES = words(
    """Anna Tom Mia Ben Lena Max Sara Paul Nora Finn Eva Leo Ida Jonas Clara Hugo Maria Peter Julia David Emma Lucas
    Sofia Adam Alice Bob Carol Dan Ella Frank Grace Henry Iris Jack Kate Liam Mona Nick Olga Pia Quinn Rosa Sam
    Tina Uma Victor Wendy Xenia Yusuf Zoe Aisha Bruno Chen Diego Elif Fatima Goran Hana Ivan José Kenji Lucía Zoë
    André Jürgen Søren Ada Alan Amir Priya Omar Ravi"""
)
ANIMALS = words(
    """fox cat dog mouse bear owl frog rabbit wolf lion hen duck horse cow sheep goat pig crow snail turtle hedgehog
    squirrel badger otter beaver deer goose swan seal whale crab spider ant bee beetle donkey camel tiger monkey
    parrot penguin robin dragon elephant giraffe kangaroo lizard mole raven"""
)
THINGS = words(
    """kite drum ball key lamp book cup hat coin ring box bell boat pen map clock rope shoe coat bag stick stone shell
    feather spoon bowl basket mirror candle blanket ladder hammer whistle violin bicycle balloon puzzle button
    ribbon lantern compass umbrella pillow bucket brush ticket marble robot sledge wagon letter cake apple pear
    lemon cookie"""
)
PLACES = words(
    """forest garden village river lake mountain castle cave island meadow desert harbour market library kitchen tower
    bridge valley beach field farm town barn attic swamp palace"""
)
ADJECTIVES = words(
    """little old brave clever lazy hungry tired happy sad lonely curious quiet proud shy kind grumpy silly gentle young
    cheerful sleepy wise clumsy friendly nervous patient polite restless"""
)
COLOUR_WORDS = words("red blue green yellow purple orange pink brown black white grey golden silver")
FOODS = words(
    """soup bread cheese cake apples rice pasta pizza honey nuts berries fish beans salad porridge cookies plums
    potatoes"""
)
TOWNS = sorted(
    {
        *CAPITALS.values(),
        "Hamburg",
        "Munich",
        "Lyon",
        "Porto",
        "Seville",
        "Boston",
        "Sydney",
        "Osaka",
        "Leeds",
        "Zürich",
    }
)
JOBS = words(
    "baker teacher farmer doctor sailor painter singer writer pilot cook nurse gardener carpenter driver clown"
)
MORE_WORDS = words(
    """able above accept across action actor adult advice afternoon airport alarm album animal answer ankle apron arm
    army arrow artist autumn avenue award baby bacon bagel bakery bamboo banana band bank barrel battle beach
    bean beard beauty bed bedroom beer bench berry bird birthday biscuit blood board body bone bottle bottom
    brain branch bread breakfast breath brick bride brother bubble budget building bulb bus bush butter cabin
    cable cactus calendar camera camp canal candy canoe canvas captain car carpet carrot castle cat ceiling
    century chain chair chalk chance chapter cheese cherry chess chest chicken child chin chocolate church cinema
    circle circus city class cloth cloud coach coast coffee collar colour comb comet concert copper coral corn
    corner cotton country cousin cow cradle cream creature crown crystal cube cupboard curtain cushion customer
    dance danger daughter dawn deck dentist desk dessert diamond diary dinner dinosaur dish doctor doll dolphin
    door dream dress drink driver dust eagle ear earth earthquake east edge egg elbow engine envelope evening
    exam exit eye face factory fairy family famous farmer father fence fever film finger fire fireplace fish flag
    flame flight floor flower flute fog food foot football forest fork fountain freedom fridge friend fruit
    furniture future galaxy game garage garlic gate ghost giant gift ginger girl glass globe glove glue gold
    grain grandmother grape grass ground group guest guitar hair hall hand handle happiness harbour harvest head
    heart heat heaven helmet hero hill history hobby holiday home honey hook hope hospital hotel hour house human
    hundred hunter husband ice idea ink insect instrument iron island jacket jam jar jeans jelly jewel job joke
    journey judge juice jump jungle kettle kingdom kiss kitchen knee knife knight knot lady lake language laugh
    lawyer leaf leather lecture leg lemonade lesson library light lightning lily line lip list lock loop lunch
    machine magazine magic magnet marmalade market marriage mask match meadow meal meat medicine melody melon
    member memory message metal meter midnight milk mill minute miracle model moment money month moon morning
    mother motor mountain mouth movie muscle museum mushroom music mustard nail name nature neck needle neighbour
    nest net newspaper night noise noodle noon nose notebook number nurse ocean office onion opera orange orchard
    orchestra oven owner oxygen package page paint pair palace pan pancake panda paper parade parent park party
    passage passenger pasta path peace peach peanut pencil people pepper person phone photo piano picnic picture
    piece pigeon pilot pine pipe pirate planet plant plate player pleasure plumber pocket poem poet police pond
    potato powder present prince princess prison prize problem promise pumpkin pupil purple queen question quilt
    race radio railway rain rainbow recipe record rest restaurant result rice riddle river road rock rocket roof
    room root rose route rubber ruler sailor salad salmon salt sand sandwich scarf school science scissors screen
    sea season seat second secret seed servant shadow shark shelf ship shirt shop shoulder shower sister size
    skin skirt sky sleep sleeve smoke snow soap sock soldier song sound soup space spark speech spice sponge
    spring square stadium stage stairs star station statue steam stew stomach storm story strawberry stream
    street string student sugar suitcase summer sun sunflower supper surprise sweater swimmer sword table tailor
    talent taxi teacher team tear telephone temple tennis tent test theatre thief thing thought thread throat
    throne thumb thunder tiger toast toilet tomato tongue tool tooth top toy tractor train traffic treasure tree
    triangle trip trousers truck trumpet truth tulip tunnel twin uncle unicorn uniform universe valley vase
    vegetable village vinegar visitor voice volcano wall wallet walnut war wardrobe warrior watch water wave
    weather wedding week wheat wheel widow wind window wing winter wisdom witch wizard woman wonder wood wool
    word world worm wound wrist yard year yellow yogurt zebra zero zipper bread crane plank storm gravel hollow
    marsh pebble quarry ripple stump timber twig vine willow amber anchor badge beacon blossom bramble canyon
    cedar cinder clover cobweb cricket dagger drizzle ember fern fiddle flint glacier gravy hazel heron ivory
    jasmine kernel lagoon lavender linen locust maple mitten nectar nettle nutmeg oyster parsley pepper plaster
    poppy prairie puddle quiver raisin ravine saddle satin shovel sparrow spindle sprout stable sycamore thistle
    thyme trellis turnip velvet violet walrus weasel whisker yarrow computer keyboard python tensor number banana
    yesterday tomorrow together remember umbrella difficult beautiful wonderful important different everything
    adventure alphabet butterfly caterpillar chimney crocodile electric elevator festival generous handsome
    helicopter identical jealous kindness lighthouse microscope nightmare octopus pineapple quarter rectangle
    saxophone telescope umpire vacation watermelon xylophone zeppelin absolute balance ceremony delicate enormous
    feather gallery horizon invisible journal knowledge landscape midsummer northern opinion passenger quality
    religion skeleton tradition ultimate vertical wilderness"""
)
WORDS = sorted({
    word.lower()
    for word in [*MORE_WORDS, *ANIMALS, *THINGS, *PLACES, *ADJECTIVES, *COLOUR_WORDS, *FOODS, *JOBS, *PLANETS, *DAYS,
        *MONTHS,
                 *OPPOSITES, *OPPOSITES.values(), *YOUNG.values(), *SYMBOLS, *PAST, *PAST.values(),
                     *PLURALS.values(), *SIDES, *GERMAN]
    if word.isascii() and word.isalpha() and 3 <= len(word) <= 11
})  # fmt: skip
