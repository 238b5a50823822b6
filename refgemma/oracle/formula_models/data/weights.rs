// One tensor of a revealing model, a number a line: weights TENSOR COUNT EXPONENT SIGNED
fn weight(tensor: u32, n: u32, exponent: u32, signed: bool) -> f32 {
    let mut x = 0x9E3779B9u32.wrapping_mul(tensor + 1).wrapping_add(n);
    x = (x ^ x >> 16).wrapping_mul(0x7FEB352D);
    x = (x ^ x >> 15).wrapping_mul(0x846CA68B);
    let b = ((x ^ x >> 16) >> 24) as i32;
    (if signed { 2 * b - 255 } else { b }) as f32 / (1u32 << exponent) as f32
}

fn main() {
    let args: Vec<u32> = std::env::args().skip(1).map(|arg| arg.parse().unwrap()).collect();
    for n in 0..args[1] {
        println!("{}", weight(args[0], n, args[2], args[3] != 0));
    }
}
